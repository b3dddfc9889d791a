"""`peftune chat`: talk to a trained language model, which answers word by word."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peftune.errors import EXIT_DONE, ConfigError, DataError, Fault, MachineError
from peftune.imports import without_search_for_garbage

if TYPE_CHECKING:  # torch comes with it, and help must not wait for it
    from peftune.reopen import Trained

WORDS = "/new starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer"
COLDEST = 1e-6
"""Temperature, besides 0: scores divided by much less are no float32 any more."""


def add_chat(commands: Any) -> None:
    """Add `peftune chat` with its options to the commands."""
    text = "talk to a trained language model"
    chat = commands.add_parser("chat", help=text, description=f"{text}: {WORDS}")
    chat.set_defaults(command=_chat, takes_overrides=False)
    chat.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, its best/, or a folder of a model")
    chat.add_argument("--config", help="instead of the run's own")
    chat.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer; default 512")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T",
                      help="0, the default, writes the likeliest each time, as evaluation does; 1 draws")


def _chat(parsed: argparse.Namespace) -> int:
    if parsed.max_new_tokens < 1:
        raise _refused("--max-new-tokens", parsed.max_new_tokens, "use 1 or more")
    if parsed.temperature != 0 and not COLDEST <= parsed.temperature < math.inf:
        raise _refused("--temperature", parsed.temperature, f"use 0, or {COLDEST} and more")
    with without_search_for_garbage():
        from peftune.config.schema import GENERATIVE
        from peftune.reopen import find_trained, open_weights, opened

    with opened(only_json=False) as (world, display):
        if world.ranks > 1:
            raise MachineError(Fault(kind="environment", message=f"chat runs in one process, not in {world.ranks}",
                                     mend="peftune chat ..., without a launcher"))
        folder, config = find_trained(parsed.model, parsed.config, needs_data=False)
        if config.task not in GENERATIVE:
            raise ConfigError(Fault(kind="config", message=f"{parsed.model} is for {config.task}: it writes no text",
                                    mend=f"peftune predict {parsed.model} --input F --output F"))
        trained = open_weights(folder, config, world, display)
        talk = Talk(trained, parsed.system, parsed.max_new_tokens, parsed.temperature)
        display.say(WORDS)
        _listen(talk)
    return EXIT_DONE


def _refused(option: str, given: float, mend: str) -> MachineError:
    return MachineError(Fault(kind="environment", message=f"{option} {given:g}", mend=mend))


def _listen(talk: Talk) -> None:
    """A line is a turn, until /exit or the end of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # else the first bad byte loses what is read together with it
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        line = _heard()
        if line is None:
            print()
            return
        if line == "/exit":
            return
        if line == "/new":
            talk.begin()
        elif line:
            try:
                _check_letters(line)
                talk.turn(line, _print_piece)
            except DataError as error:
                print(f"error: {error}", end="")
            except KeyboardInterrupt:
                print(" ...", end="")
            print(flush=True)


def _heard() -> str | None:
    """The next line; None where there is none, which python says of a closed input in its own way."""
    if sys.stdin is None:
        return None
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _check_letters(line: str) -> None:
    """Raise DataError for bytes that are no letters: `surrogateescape` keeps them as halves of UTF-16 pairs."""
    if any("\udc80" <= letter <= "\udcff" for letter in line):
        encoding = (sys.stdin.encoding or "UTF-8").upper()
        raise DataError(Fault(kind="data", message=f"the line is not {encoding}: it was not said to the model",
                              mend=f"write it in {encoding}, or convert it, as iconv does"))


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


@dataclass(slots=True)
class Talk:
    """A conversation with one model."""

    trained: Trained
    system: str | None
    max_new_tokens: int
    temperature: float
    """0: the likeliest token each time."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def turn(self, said: str, say: Callable[[str], None]) -> None:
        """Answer, and say the answer piece by piece. What was said of it stays, also if it is interrupted.

        Raises:
            DataError: the template refuses the conversation, or it is longer than the model can read.
        """
        from peftune.loop.generate import stream_text

        ids = self._prompt(said)
        pieces: list[str] = []

        def tell(piece: str) -> None:
            pieces.append(piece)
            say(piece)

        trained = self.trained
        try:
            stream_text(trained.model, trained.text.tokenizer, ids, max_new_tokens=self.max_new_tokens,
                        temperature=self.temperature, device=trained.evaluator.world.device,
                        autocast=trained.evaluator.autocast, say=tell)
        finally:
            self.messages += [{"role": "user", "content": said},
                              {"role": "assistant", "content": "".join(pieces).strip()}]

    def _prompt(self, said: str) -> list[int]:
        """The conversation so far as the model was trained to read it."""
        from peftune.data.targets import RowFault
        from peftune.model.load import MOST_TOKENS, longest_input
        from peftune.tasks.supervision import prompt_tokens

        text = self.trained.text
        room = longest_input(text.config, MOST_TOKENS) - text.virtual_tokens - self.max_new_tokens
        try:
            example = prompt_tokens({"messages": [*self.messages, {"role": "user", "content": said}]},
                                    replace(text.encoder.text, max_length=MOST_TOKENS))
        except RowFault as error:
            raise DataError(Fault(kind="data", message=error.message, mend="/new, or leave --system out")) from None
        if len(example.input_ids) > room:
            raise DataError(Fault(
                kind="data", message=f"{len(example.input_ids):,} tokens so far, and the model reads {max(0, room):,} "
                "and writes the rest", mend="/new, or a smaller --max-new-tokens"))
        return list(example.input_ids)
