"""Hostile chat templates."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.fuzz_values import Draw
from peftune.config.schema import DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.data.prepare import prepare
from peftune.tasks import TASKS
from peftune.tasks.text import open_text
from tests import tiny

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


RIGHT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}", "{{ eos_token }}{% endfor %}"
"""What writes a turn, and ends it: bits between them may leave a right template."""


@st.composite
def templates(draw: Draw) -> str:
    """Jinja text."""
    bits = st.one_of(st.sampled_from(JINJA_BITS), st.sampled_from(JINJA_BITS), st.text(max_size=6))
    begin, end = draw(st.sampled_from((RIGHT, ("", ""))))
    return begin + "".join(draw(st.lists(bits, min_size=1, max_size=2 if begin else 7))) + end


def act_on_template(draw: str, folder: Path, models: Path) -> None:
    """Render conversations with it, as the data path does."""
    text = open_text(
        TASKS["causal_lm"](TrainConfig(), EvaluationConfig()),
        ModelConfig(name_or_path=str(models / "decoder"), dtype="float32"),
        DataConfig(train="x", max_length=64, chat_template="{{ '' }}" + draw),
    )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(12)[:4]))
    prepare(DataConfig(train=str(path), validation=None), text.encoder, seed=0, identity=text.identity())
