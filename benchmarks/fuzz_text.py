"""Hostile text: configs, overrides, data files, chat templates. A kind is a strategy and what is done with a draw."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from hypothesis import strategies as st
from pyarrow import parquet

from peftune.config.load import dump, load
from peftune.config.names import FAMILIAR, key_paths
from peftune.config.schema import DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.data.prepare import open_prepared, prepare
from peftune.data.sources import READERS
from peftune.reopen import read_prompts
from peftune.tasks import TASKS
from peftune.tasks.text import Text, open_text
from tests import tiny

Draw = Any
ROWS = {
    "sequence_classification": tiny.intent_rows(12),
    "token_classification": tiny.tagged_rows(12),
    "question_answering": tiny.question_rows(12, unanswerable=True),
    "causal_lm": tiny.chat_rows(12),
    "preference": tiny.preference_rows(12),
}
BY_TASK = {
    "causal_lm": [
        [{"text": f"plain text {n}"} for n in range(8)],
        [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(8)],
        [{"instruction": "say", "input": "", "output": f"it {n}"} for n in range(8)],
        [
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": f"so {n}"}],
                "tools": [{"type": "function"}],
            }
            for n in range(8)
        ],
        [
            {
                "messages": [
                    {"role": "user", "content": "go"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                    },
                ]
            }
            for n in range(8)
        ],
    ],
    "preference": [
        [
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
            }
            for n in range(8)
        ]
    ],
    "sequence_classification": [
        [{"text": f"t {n}", "label": n / 7} for n in range(8)],
        [{"text": f"t {n}", "label": ["a", "b"][: n % 3]} for n in range(8)],
    ],
    "token_classification": [[{"tokens": ["a", "b"], "ner_tags": [0, n % 2]} for n in range(8)]],
    "question_answering": [
        [
            {
                "paragraphs": [
                    {
                        "context": "it is so",
                        "qas": [{"question": "is it?", "answers": [{"text": "so", "answer_start": 6}]}],
                    }
                ]
            }
            for _ in range(8)
        ]
    ],
}

ODD_TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "a\ud83d",
    "\ufeff",
    "\u202e",
    "\r",
    "\n\n",
    "a" * 70_000,
    "é" * 300,
    "\u0345" * 99,
    "</s>",
    "<s>",
    "[CLS]",
    "[PAD]",
    "{{ x }}",
    "{% for %}",
    "nan",
    "NaN",
    "1e999",
    "../../x",
    "/etc/passwd",
    "~",
    "*",
    "**/*",
    "[",
    "B-",
    "I-x",
    "O",
    "B",
    "-",
    "user",
    "null",
    "0",
    "𝕊𝕠",
    "\x1b[31m",
    "%s%n",
    "-1",
    "org/name",
    "a:b:c",
    "http://x",
    "auto",
    "all",
    "never",
    "lora",
    "true",
    ".",
    "..",
    "\ue000stand-in\ue000",
)
ODD = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e308, -0.0, 5e-324, float("nan"), float("inf"), 0.5]),
    st.text(max_size=20),
    st.floats(),
)
NESTED = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=8)), inner, max_size=4),
    ),
    max_leaves=6,
)


def settings(folder: str) -> dict[str, Any]:
    """A right config, to be spoilt."""
    return {
        "task": "causal_lm",
        "output_dir": f"{folder}/run",
        "model": {"name_or_path": "org/model"},
        "adapter": {"method": "lora", "r": 8},
        "data": {"train": "t.jsonl", "columns": {"a": "b"}},
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
SPECIAL = ("a folder", "a pipe", "/dev/zero", "/dev/null", "missing", "no permission")


@st.composite
def configs(draw: Draw) -> tuple[bytes, list[str]]:
    """The bytes of a config file, and overrides."""
    kind = draw(st.sampled_from(("settings", "settings", "settings", "bits", "bytes", "aliases")))
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


def spoilt_bytes(draw: Draw, content: bytes) -> bytes:
    """Bytes cut, doubled, flipped, or with others put between."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        what = draw(st.sampled_from(("cut", "flip", "insert", "drop", "bom", "cr", "double", "utf16")))
        if what == "cut":
            content = content[:at]
        elif what == "flip":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif what == "insert":
            content = (
                content[:at]
                + draw(
                    st.one_of(
                        st.binary(max_size=8),
                        st.sampled_from(
                            (
                                b"\x00",
                                b"\xff",
                                b'"',
                                b"\n",
                                b"\r",
                                b"{",
                                b"}",
                                b"[" * 3000,
                                b'{"a":' * 3000,
                                b"\xed\xa0\x80",
                                b"NaN",
                                b"\\ud800",
                                b",",
                                b"\t",
                                b"9" * 5000,
                            )
                        ),
                    )
                )
                + content[at:]
            )
        elif what == "drop":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        elif what == "bom":
            content = b"\xef\xbb\xbf" + content
        elif what == "cr":
            content = content.replace(b"\n", draw(st.sampled_from((b"\r", b"\r\n", b"\n\n"))))
        elif what == "double":
            content += content[:at]
        else:
            content = content.decode("utf-8", "replace").encode("utf-16")
    return content


def act_on_config(draw: tuple[bytes, list[str]], folder: Path) -> None:
    """Load it; what loads must dump to the same config."""
    path = folder / "config.yaml"
    path.write_bytes(draw[0])
    config = load([str(path), *draw[1]])
    again = folder / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load([str(again)]) == config, "the dump of a config is another config"


@st.composite
def data_files(draw: Draw) -> tuple[str, str, bytes | str, dict[str, Any]]:
    """A task, an ending, the file's bytes or what stands in its place, and settings of the data section."""
    task = draw(st.sampled_from(list(ROWS)))
    ending = draw(st.sampled_from((".jsonl", ".json", ".parquet", *sorted(READERS))))
    section = {
        "validation": draw(st.sampled_from((None, 0.3))),
        "on_bad_row": draw(st.sampled_from(("error", "skip"))),
        "max_length": draw(st.sampled_from((64, 64, 64, 8, 2, 1))),
        "too_long": draw(st.sampled_from(("truncate", "drop", "error"))),
        "train_on": draw(st.sampled_from(("completion", "last_turn", "all"))),
    }
    if not draw(st.integers(0, 4)):
        section["format"] = draw(st.sampled_from(TASKS[task](TrainConfig(), EvaluationConfig()).formats))
    if not draw(st.integers(0, 19)):
        return task, ending, draw(st.sampled_from(SPECIAL)), section
    rows = [dict(row) for row in draw(st.sampled_from([ROWS[task], *BY_TASK[task]]))]
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2, 4)))):
        _spoil_row(draw, rows)
    content = _written(rows, ending, draw)
    return task, ending, spoilt_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content, section


def _spoil_row(draw: Draw, rows: list[Any]) -> None:
    number = draw(st.integers(0, len(rows) - 1))
    if not draw(st.integers(0, 9)) or not isinstance(rows[number], dict):
        rows[number] = draw(NESTED)
        return
    rows[number] = json.loads(json.dumps(rows[number]))
    holder, key = rows[number], draw(st.sampled_from([*rows[number], "id", "tools", "system", "text_pair", "label"]))
    while draw(st.booleans()) and isinstance(holder, dict) and isinstance(holder.get(key), dict | list) and holder[key]:
        holder = holder[key]
        if isinstance(holder, list):
            inside = draw(st.integers(0, len(holder) - 1))
            if isinstance(holder[inside], dict) and holder[inside]:
                holder = holder[inside]
                key = draw(st.sampled_from([*holder, "tool_calls", "weight"]))
            else:
                holder[inside] = draw(NESTED)
                return
        else:
            key = draw(st.sampled_from(list(holder)))
    if draw(st.integers(0, 4)):
        holder[key] = draw(NESTED)
    else:
        holder.pop(key, None)


def _written(rows: list[Any], ending: str, draw: Draw) -> bytes:
    if ending == ".parquet":
        return _as_parquet(rows, draw)
    if ending in (".csv", ".tsv"):
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="\t" if ending == ".tsv" else ",", escapechar="\\")
        records = [row for row in rows if isinstance(row, dict) and row] or [{"text": "x"}]
        writer.writerow(list(records[0]))
        for row in records:
            writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
        text = stream.getvalue()
    elif ending == ".json":
        text = json.dumps({"data": rows} if draw(st.booleans()) else rows, ensure_ascii=draw(st.booleans()))
    elif ending in (".conll", ".bio", ".iob", ".iob2"):
        text = (
            "".join(
                f"{word} {tag}\n"
                for row in tiny.tagged_rows(6)
                for word, tag in zip(row["tokens"], row["ner_tags"], strict=True)
            )
            + "\nx\ny B-\n"
        )
    elif ending == ".txt":
        text = "\n".join(str(row) for row in rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


STRANGE = (
    lambda n: pyarrow.array([b"\xff"] * n),
    lambda n: pyarrow.array([1] * n, pyarrow.date32()),
    lambda n: pyarrow.array([1] * n, pyarrow.timestamp("ns")),
    lambda n: pyarrow.array([None] * n, pyarrow.null()),
    lambda n: pyarrow.array([1] * n, pyarrow.duration("s")),
    lambda n: pyarrow.array([Decimal("1.50")] * n),
    lambda n: pyarrow.array([[("a", 1)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    lambda n: pyarrow.array([{"when": datetime(2026, 1, 1)}] * n),
    lambda n: pyarrow.array([float("nan")] * n),
    lambda n: pyarrow.array(
        [
            [
                {"role": "user", "content": "x", "at": datetime(2026, 1, 1)},
                {"role": "assistant", "content": "y", "raw": b"\xff"},
            ]
        ]
        * n
    ),
)
"""Columns of values that JSON has no word for."""


def _as_parquet(rows: list[Any], draw: Draw) -> bytes:
    """Columns as pyarrow infers them, or else their values as bytes; one perhaps of a type that JSON lacks."""
    records = [row for row in rows if isinstance(row, dict)]
    columns: dict[str, pyarrow.Array] = {}
    for name in dict.fromkeys(key for row in records for key in row):
        columns[name.encode("utf-8", "replace").decode()] = _column([row.get(name) for row in records])
    if columns and not draw(st.integers(0, 2)):
        columns[draw(st.sampled_from([*columns, "id"]))] = draw(st.sampled_from(STRANGE))(len(records))
    return _table_bytes(columns)


def _column(values: list[Any]) -> pyarrow.Array:
    try:
        array = pyarrow.array(values)
        _table_bytes({"x": array})
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return pyarrow.array([repr(value).encode("utf-8", "replace") for value in values])
    return array


def _table_bytes(columns: dict[str, pyarrow.Array]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def put(path: Path, content: bytes | str) -> None:
    """Bytes, or one of SPECIAL, at a path."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a folder":
        path.mkdir()
    elif content == "a pipe":
        os.mkfifo(path)
    elif content.startswith("/dev"):
        path.symlink_to(content)
    elif content == "no permission":
        path.write_bytes(b"x")
        path.chmod(0)


@functools.cache
def text_of(task: str, model: str) -> Text:
    """The text side of a task, opened once."""
    return open_text(
        TASKS[task](TrainConfig(), EvaluationConfig()),
        ModelConfig(name_or_path=model, dtype="float32"),
        DataConfig(train="x", max_length=64),
    )


def model_of(task: str, models: Path) -> str:
    """The tiny model that a task trains."""
    return str(models / ("decoder" if task in ("causal_lm", "preference") else "encoder"))


def act_on_data(draw: tuple[str, str, bytes | str, dict[str, Any]], folder: Path, models: Path) -> None:
    """Read, check, tokenise it; then read every example."""
    task, ending, content, section = draw
    path = folder / f"rows{ending}"
    put(path, content)
    text = text_of(task, model_of(task, models))
    config = DataConfig(train=str(path), **section)
    found = open_prepared(prepare(config, text.encoder, seed=0, identity=text.identity()))
    for split in found.splits.values():
        assert all(len(split[n].input_ids) for n in range(len(split)))


@st.composite
def inputs_to_predict(draw: Draw) -> tuple[str, str, bytes | str]:
    """A task, and a file of `peftune predict`."""
    task, ending, content, _ = draw(data_files())
    return task, ending, content


def act_on_input(draw: tuple[str, str, bytes | str], folder: Path, models: Path) -> None:
    """Read it and encode its records, as `peftune predict` does."""
    task, ending, content = draw
    path = folder / f"input{ending}"
    put(path, content)
    text = text_of(task, model_of(task, models))
    read_prompts(str(path), text.encoder, {})


JINJA_BITS = (
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m['content'] }}",
    "{{ m.role }}",
    "{{ messages }}",
    "{{ eos_token }}",
    "{% if add_generation_prompt %}",
    "{% endif %}",
    "{% else %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(10**9) }}",
    "{% set x = namespace() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ open('/etc/passwd') }}",
    "{{ raise_exception('no') }}",
    "{{ m['tool_calls'] }}",
    "{{ 1 / 0 }}",
    "{{ m.content[99].x.y }}",
    "{%",
    "%}",
    "{{",
    "}}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ '%s' % 1 }}",
    "{{ lipsum() }}",
    "{{ self }}",
    "{# #}",
    "{{ m | tojson }}",
    "{{ strftime_now('%Y') }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ config }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% break %}",
    "{{ messages[0] is mapping }}",
    "{{ bos_token + 1 }}",
    "\x00",
    "\ud800",
)


def templates() -> st.SearchStrategy[str]:
    """Jinja text."""
    return st.lists(
        st.one_of(st.sampled_from(JINJA_BITS), st.sampled_from(JINJA_BITS), st.text(max_size=6)), min_size=1, max_size=7
    ).map("".join)


def act_on_template(draw: str, folder: Path, models: Path) -> None:
    """Render conversations with it, as the data path does."""
    text = open_text(
        TASKS["causal_lm"](TrainConfig(), EvaluationConfig()),
        ModelConfig(name_or_path=str(models / "decoder"), dtype="float32"),
        DataConfig(train="x", max_length=64, chat_template="{{ '' }}" + draw),
    )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS["causal_lm"][:4]))
    prepare(DataConfig(train=str(path), validation=None), text.encoder, seed=0, identity=text.identity())
