"""Hostile configs and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from benchmarks.fuzz_values import NESTED, ODD, ODD_TEXTS, Draw, spoilt_bytes
from peftune.config.load import dump, load
from peftune.config.names import FAMILIAR, key_paths


def settings(folder: str) -> dict[str, Any]:
    """A right config, to be spoilt."""
    return {
        "task": "causal_lm",
        "output_dir": f"{folder}/run",
        "model": {"name_or_path": "org/model"},
        "adapter": {"method": "lora", "r": 8},
        "data": {"train": "t.jsonl", "columns": {"text": "b"}},
        "train": {"batch_size": 8},
        "evaluation": {},
        "checkpoint": {},
        "log": {},
    }


@st.composite
def spoilt_settings(draw: Draw) -> dict[str, Any]:
    """Settings with up to five keys set to what they should not be."""
    values = settings("out")
    names = [*key_paths(), *FAMILIAR, "base", "adapter.target_modules", "adapter.modules_to_save", "x", ""]
    for _ in range(draw(st.integers(1, 5))):
        path = draw(st.one_of(st.sampled_from(names), st.text(max_size=6))).split(".")
        at: Any = values
        for part in path[:-1]:
            at = at.setdefault(part, {}) if isinstance(at, dict) else {}
        if isinstance(at, dict):
            at[path[-1] if draw(st.integers(0, 9)) else draw(st.one_of(ODD, st.none()))] = draw(NESTED)
    return values


NUMERIC = st.from_regex(r"[-+.:_eEx0-9]{1,8}", fullmatch=True)
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12), NUMERIC)
"""Among them what YAML could take for numbers and times."""


@st.composite
def odd_settings(draw: Draw) -> dict[str, Any]:
    """Settings of texts that nobody expects, and that may be right all the same."""
    values = settings(draw(TEXTS))
    values["model"]["name_or_path"], values["model"]["added_tokens"] = draw(TEXTS), draw(st.lists(TEXTS, max_size=3))
    values["data"] |= {"train": draw(st.one_of(TEXTS, st.lists(TEXTS, max_size=3))), "columns": {"text": draw(TEXTS)}}
    return values


YAML_BITS = (
    "task: causal_lm\n",
    "model:\n",
    "  name_or_path: x\n",
    "data: {train: x}\n",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "<<: ",
    "!!python/object/apply:os.system [id]",
    "!!binary ",
    "!!set ",
    "!!omap ",
    "!!timestamp ",
    "!x ",
    "---\n",
    "...\n",
    "%YAML 9.9\n",
    "|\n",
    ">-\n",
    "'",
    '"',
    "#",
    "\t",
    "  ",
    "\n",
    "\r",
    "0x",
    "0o",
    "1_000",
    "12:30:45",
    ".inf",
    ".nan",
    "2026-01-01",
    "~",
    "=",
    "null",
    "yes",
    "\ufeff",
    "\x00",
    "\x85",
    "\u2028",
    "base: ",
    "base: config.yaml\n",
    "base: .\n",
    "1: 2\n",
    "[1]: 2\n",
    "true: 1\n",
    "adapter: ",
)


@st.composite
def configs(draw: Draw) -> tuple[bytes, list[str]]:
    """The bytes of a config file, and overrides."""
    kind = draw(st.sampled_from(("odd", "odd", "settings", "settings", "settings", "bits", "bytes", "aliases")))
    if kind == "odd":
        return json.dumps(draw(odd_settings())).encode(), []
    if kind == "settings":
        content = _yaml(draw(spoilt_settings()), draw(st.booleans()))
    elif kind == "bits":
        content = "".join(
            draw(st.lists(st.one_of(st.sampled_from(YAML_BITS), st.text(max_size=4)), max_size=30))
        ).encode("utf-8", "surrogatepass")
    elif kind == "aliases":
        depth = draw(st.integers(2, 40))
        content = (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, depth))
        ).encode()
    else:
        content = draw(st.binary(max_size=300))
    return spoilt_bytes(draw, content) if not draw(st.integers(0, 4)) else content, draw(
        st.lists(overrides(), max_size=3)
    )


@st.composite
def overrides(draw: Draw) -> str:
    """A word of the command line."""
    key = draw(st.one_of(st.sampled_from(list(key_paths())), st.sampled_from(list(FAMILIAR)), st.text(max_size=12)))
    value = draw(
        st.one_of(
            st.sampled_from(YAML_BITS),
            st.sampled_from(ODD_TEXTS),
            st.text(max_size=12),
            NESTED.map(lambda v: json.dumps(v)),
        )
    )
    return draw(st.sampled_from((f"{key}={value}", f"{key}", f"{key}={value}={value}", f"{key}.{value}=1", value)))


def _yaml(values: Any, flow: bool) -> bytes:
    try:
        return yaml.safe_dump(values, allow_unicode=True, default_flow_style=flow, sort_keys=False).encode(
            "utf-8", "surrogatepass"
        )
    except yaml.YAMLError:
        return repr(values).encode("utf-8", "surrogatepass")


def act_on_config(draw: tuple[bytes, list[str]], folder: Path) -> None:
    """Load it; what loads must dump to the same config."""
    path = folder / "config.yaml"
    path.write_bytes(draw[0])
    config = load([str(path), *draw[1]])
    again = folder / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load([str(again)]) == config, "the dump of a config is another config"
