"""model.compile=parts: what lies between products, compiled, beside the same as torch runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from peftune.errors import MachineError
from peftune.model import fusion
from peftune.model.fusion import fused_passes
from peftune.model.lean import layers_of_passes, make_lean
from tests.conftest import metric_rows, write_config
from tests.equivalence.test_lean import adapted, assert_one_step

CPU = torch.device("cpu")
TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_compiled_step_is_the_plain_one(activation: str) -> None:
    plain = adapted(activation=activation)
    twin = copy.deepcopy(plain)
    make_lean(twin, by_module=False, passes=fused_passes(CPU, torch.float32))
    assert layers_of_passes(twin) == 5 + 2 + 2
    assert_one_step(plain, twin, TOLERANCE)


@pytest.mark.slow
def test_no_number_of_tokens_is_compiled_anew() -> None:
    model = adapted()
    make_lean(model, by_module=False, passes=fused_passes(CPU, torch.float32))
    graphs = []
    for tokens in (9, 14, 23, 31):
        ids = torch.arange(tokens)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1 and graphs[0] > 0


@pytest.mark.slow
def test_a_compiled_run_keeps_its_packed_rows_and_its_losses(train: Any, converse: dict[str, Any], capsys: Any) -> None:
    losses = []
    for name, compiled in (("plain", "false"), ("parts", "parts")):
        folder = train(converse, f"model.compile={compiled}", name=name)
        losses.append([row["loss"] for row in metric_rows(folder, "train")])
    said = capsys.readouterr().out
    assert "elementwise parts of 9 layers are compiled" in said and said.count(", packed") == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 6


@pytest.mark.slow
def test_a_model_without_such_layers_says_so(train: Any, classify: dict[str, Any], capsys: Any) -> None:
    train(classify, "model.compile=parts", "train.max_steps=1")
    assert "model.compile=parts knows no layer of this model" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "layers"), [("ddp", 9), ("zero3", 7), ("fsdp2", 9)])
def test_processes_that_compile_train_the_model_of_one_that_does_not(
    train: Any, command: Any, converse: dict[str, Any], tmp_path: Path, strategy: str, layers: int
) -> None:
    plain = train(converse, name="plain")
    folder = tmp_path / strategy
    ended = command("-m", "peftune", "train", "--processes", 2, "--strategy", strategy,
                    write_config({**converse, "output_dir": str(folder)}, tmp_path / "config"), "model.compile=parts",
                    env={"ACCELERATE_USE_CPU": "true"}, timeout=400)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert f"elementwise parts of {layers} layers are compiled" in ended.stdout, "ZeRO-3 gathers gated blocks by module"
    losses = [[row["loss"] for row in metric_rows(one, "train")] for one in (plain, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_what_to_install(
    converse: dict[str, Any], tmp_path: Path, command: Any
) -> None:
    config = write_config(converse, tmp_path / "config")
    ended = command("-m", "peftune.train", config, "model.compile=parts", env={
        "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert ended.returncode == 2
    assert "model.compile = 'parts'" in ended.stderr and "mend: model.compile=false, or install g++" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_compiles_to_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_deviation", lambda *_: 0.5)
    with pytest.raises(MachineError, match=r"differs by 0\.5"):
        fused_passes(CPU, torch.float32)
