"""AdaLoRA's budget: ranks move during training to the layers that need them.

Source: Zhang et al., 2023, arXiv:2303.10512. An adapter is P diag(E) Q; after each step the importance of each of its
triplets is brought up to date, and now and then those outside the budget are set to zero.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.errors import ConfigError, Fault

SENSITIVITY, UNCERTAINTY, KEPT = "importance", "importance_uncertainty", "kept"
"""Keys in the optimizer's state of a weight, so that checkpoints hold them."""


def is_adalora(model: nn.Module) -> bool:
    """Whether the model's adapter has a budget to share out."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, AdaLoraConfig)


def may_set_back(model: nn.Module, name: str) -> bool:
    """Whether a weight may be zero again after a step: the singular values outside the budget."""
    return is_adalora(model) and ".lora_E." in name


class RankBudget:
    """Hooks before and after each step of the optimizer."""

    def __init__(self, model: PeftModel, optimizer: Optimizer, *, steps: int, done: int) -> None:
        """Begin after `done` of `steps` steps; what the steps before have found is in the optimizer's state.

        Raises:
            ConfigError: the phases do not fit into the run.
        """
        config = model.active_peft_config
        if config.tinit >= steps - config.tfinal:
            raise ConfigError(Fault(
                kind="config", message=f"adapter.tinit = {config.tinit} and adapter.tfinal = {config.tfinal} leave no "
                f"step of {steps} in which ranks are shared out", mend="make them smaller, or train longer"))
        config.total_step = steps
        self._model, self._optimizer, self._config = model, optimizer, config
        self._allocator = model.base_model.rankallocator
        self._weights = {name: parameter for name, parameter in model.base_model.model.named_parameters()
                         if "lora_" in name and parameter.requires_grad}
        self._step = done
        optimizer.register_step_pre_hook(self._pull_towards_orthogonal)
        optimizer.register_step_post_hook(self._share_out)

    def _pull_towards_orthogonal(self, *_: Any) -> None:
        """Add the gradient of the paper's regulariser, equation 4, averaged over the matrices as PEFT does.

        Once a step and after clipping, as weight decay: the loss is a sum over targets, of which it is none.
        """
        with torch.enable_grad():
            matrices = {name: weight for name, weight in self._weights.items() if "lora_E" not in name}
            total = sum(_distance_from_orthogonal(weight, rows="lora_A" in name) for name, weight in matrices.items())
            loss = self._config.orth_reg_weight * total / len(matrices)
            gradients = torch.autograd.grad(loss, list(matrices.values()))
        for weight, gradient in zip(matrices.values(), gradients, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    @torch.no_grad()
    def _share_out(self, *_: Any) -> None:
        """PEFT's `update_and_allocate`, with its memory kept in the optimizer's state."""
        self._step += 1
        allocator, states = self._allocator, self._optimizer.state
        last = self._config.total_step - self._config.tfinal
        values = {name: weight for name, weight in self._weights.items() if "lora_E" in name}
        if self._step > last:
            for weight in values.values():
                weight.masked_fill_(states[weight][KEPT] == 0, 0.0)
            return
        allocator.reset_ipt()
        for name, weight in self._weights.items():
            if SENSITIVITY in states[weight]:
                allocator.ipt[name] = torch.zeros_like(weight)  # PEFT looks here whether it has seen the weight
                allocator.exp_avg_ipt[name] = states[weight][SENSITIVITY]
                allocator.exp_avg_unc[name] = states[weight][UNCERTAINTY]
        if self._step == last:  # PEFT shares out for good by what it knew a step before
            kept = allocator.mask_to_budget(self._model.base_model.model, allocator.target_bgt)
        else:
            _, kept = allocator.update_and_allocate(self._model.base_model.model, self._step)
        for name, weight in self._weights.items():
            states[weight][SENSITIVITY] = allocator.exp_avg_ipt[name]
            states[weight][UNCERTAINTY] = allocator.exp_avg_unc[name]
        for name, flags in (kept or {}).items():
            states[values[name]][KEPT] = torch.tensor(flags, dtype=torch.float32, device=values[name].device)[:, None]


def _distance_from_orthogonal(weight: Tensor, *, rows: bool) -> Tensor:
    """Frobenius norm of Q Q^T - I for rows, of P^T P - I for columns."""
    product = weight @ weight.T if rows else weight.T @ weight
    return torch.linalg.matrix_norm(product - torch.eye(len(product), device=weight.device, dtype=weight.dtype))
