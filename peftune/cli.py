"""The command `peftune`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from peftune import __version__
from peftune.cluster.command import add_launch, add_machines
from peftune.conversation import add_chat
from peftune.errors import (
    EXIT_DONE,
    EXIT_MENDABLE,
    ExportError,
    Fault,
    MachineError,
    PeftuneError,
    guarded,
    refuse_unwritable,
    writing_to,
)
from peftune.imports import without_search_for_garbage
from peftune.numerics.counted import counted
from peftune.parallel.names import STRATEGIES
from peftune.plan.command import add_plan
from peftune.starter.command import add_init
from peftune.suites import add_bench

SEQUENCE_PARALLEL = "devices that share each sequence, where one cannot hold it; a divisor of the processes"


def main(arguments: list[str]) -> int:
    """Parse a command line and run its command; return the exit code."""
    parsed = parse(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    return command(parsed)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, its `key=value` words among them as `overrides`. SystemExit where it is wrong."""
    parsed, extra = parser().parse_known_args(arguments)
    unknown = [word for word in extra if word.startswith("-") or not parsed.takes_overrides]
    if unknown:
        parser().error(f"unknown arguments: {' '.join(unknown)}")
    parsed.overrides = extra
    return parsed


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(guarded(main, sys.argv[1:]))


def parser() -> argparse.ArgumentParser:
    """The commands and their options; shtab makes a shell's completion of them."""
    top = argparse.ArgumentParser(prog="peftune", description="Fine-tune transformer models, and prove what ran.")
    top.add_argument("--version", action="version", version=f"peftune {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, *, overrides: bool = False
            ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, takes_overrides=overrides)
        return sub

    add_init(commands)
    train = add("train", _train, "train, evaluate and save: starts accelerate for this machine", overrides=True)
    train.add_argument("config", metavar="CONFIG", help="a YAML file; key=value words after it override its settings")
    train.add_argument("--strategy", default="auto", help="auto | " + " | ".join(STRATEGIES))
    train.add_argument("--processes", type=int, help="how many processes; default: one a GPU, or one")
    add_machines(train)
    train.add_argument("--sequence-parallel", type=int, default=1, metavar="N", help=SEQUENCE_PARALLEL)
    check = add("check", _check, "find every fault of config, model name and data, without loading weights",
                overrides=True)
    check.add_argument("config", metavar="CONFIG")
    check.add_argument("--strategy", choices=STRATEGIES, help="also say what this strategy cannot do")
    check.add_argument("--sequence-parallel", type=int, default=1, metavar="N", help="also say what that cannot do")
    check.add_argument("--strict", action="store_true", help="exit 2 on warnings too")
    check.add_argument("--show", type=int, default=0, metavar="N", help="print N examples, what is learned marked")
    add_plan(commands, SEQUENCE_PARALLEL)
    evaluate, export = _using(add)
    add_chat(commands)
    report = add("report", _report, "write a run's page again, or a page that compares several runs")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders; the others are compared with the first")
    report.add_argument("--to", metavar="F.html", help="default: report.html in the run folder; comparison.html here")
    add_bench(commands)
    add_launch(commands)
    add("schema", _schema, "print the JSON Schema of the config, for editors")
    for sub in (check, evaluate, export, report):
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return top


def _using(add: Callable[..., argparse.ArgumentParser]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The commands for trained models; those two of them that take --json."""
    evaluate = add("evaluate", _evaluate, "score a finished run, or a bare model with --config")
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, its best/, or a model")
    evaluate.add_argument("--config", help="task and data, instead of the run's own")
    evaluate.add_argument("--split", choices=("train", "validation", "test"), help="default: test where there is one")
    evaluate.add_argument("--output", help="write the predictions there, as JSON Lines")
    evaluate.add_argument("--tasks", metavar="NAME[,NAME]", help="lm-eval's tasks instead, with the adapter attached")
    evaluate.add_argument("--include-path", metavar="DIR", help="--tasks: a folder with tasks of your own")
    evaluate.add_argument("--batch-size", type=int, help="--tasks: rows a forward pass; default 8")
    evaluate.add_argument("--limit", type=int, help="--tasks: rows of each task; default all")
    predict = add("predict", _predict, "batch predictions or generations with a trained model")
    predict.add_argument("model", metavar="RUN", help="a run folder or its best/")
    predict.add_argument("--config", help="for a bare model")
    predict.add_argument("--input", required=True, help="rows as in training, answers left out: .jsonl, .csv, .txt ...")
    predict.add_argument("--output", required=True, help=".csv, else JSON Lines: id, prediction, ...")
    export = add("export", _export, "a folder that transformers, peft, lm-eval or llama.cpp loads, its logits compared")
    export.add_argument("source", metavar="RUN", help="a run folder, its best/, or a folder of an adapter or model")
    export.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    export.add_argument("--merge", action="store_true", help="fold the adapter into its base model")
    export.add_argument("--into", default="trained", choices=("trained", "original"),
                        help="merge into the base weights as the training held them, or as the checkpoint has them")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the written weights; default: the base's in training")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file; default 5GB")
    export.add_argument("--tolerance", type=float, help="largest difference of logits, instead of our own")
    export.add_argument("--gguf", action="store_true", help="also a GGUF file, by llama.cpp's converter")
    export.add_argument("--llama-cpp", metavar="DIR", help="checkout of llama.cpp; default: $LLAMA_CPP")
    export.add_argument("--config", help="task and data, instead of the run's own")
    return evaluate, export


def _train(parsed: argparse.Namespace) -> int:
    from peftune.config.load import load
    from peftune.config.rules import refuse_broken
    from peftune.parallel.launcher import choose_launch, node_of
    from peftune.parallel.launcher import run as launch

    config = load([parsed.config, *parsed.overrides])  # a fault in the config is said before any process starts
    node = node_of(parsed.nodes, parsed.node_rank, parsed.main_node, parsed.interface)
    line = choose_launch(parsed.strategy, parsed.processes, [parsed.config, *parsed.overrides], node, parsed.log_dir,
                         sequence_ranks=parsed.sequence_parallel)
    refuse_broken(config, line.strategy, parsed.sequence_parallel)
    print(line, file=sys.stderr, flush=True)
    return launch(line)


def _check(parsed: argparse.Namespace) -> int:
    from peftune.config.load import load

    try:
        config = load([parsed.config, *parsed.overrides])
    except PeftuneError as error:
        if not parsed.json:
            raise
        _print_json({"faults": [fault.as_json() for fault in error.faults]})
        return EXIT_MENDABLE
    with without_search_for_garbage():
        from peftune.data_check import as_json, check, show, show_examples
        from peftune.observe.display import Display

    checked = check(config, parsed.strategy, parsed.sequence_parallel)
    if parsed.json:
        _print_json(as_json(checked))
    else:
        display = Display()
        show(checked, display, parsed.config, config.data.max_length)
        show_examples(checked, display, parsed.show)
    bad = any(fault.severity == "error" or parsed.strict for fault in checked.faults)
    return EXIT_MENDABLE if bad else EXIT_DONE


def _evaluate(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage():
        from peftune.harness import refuse_idle

    refuse_idle(vars(parsed))
    if parsed.tasks:
        return _evaluate_tasks(parsed)
    with without_search_for_garbage():
        from peftune.loop.finish import prediction_lines
        from peftune.loop.publish import write_text
        from peftune.reopen import held_out, open_trained, opened, score
        from peftune.report.closing import show_metrics

    refuse_unwritable(parsed.output, "--output")
    with opened(only_json=parsed.json) as (world, display):
        trained = open_trained(parsed.model, parsed.config, world, display)
        split = parsed.split or held_out(trained.config)
        with display.phase("evaluate"):
            scored = score(trained, split)
        if world.is_main:
            if parsed.output:
                with writing_to(parsed.output, "--output"):
                    write_text(Path(parsed.output), prediction_lines(scored.records))
            if parsed.json:
                _print_json({split: scored.metrics})
            else:
                show_metrics(display, split, scored.metrics)
    return EXIT_DONE


def _evaluate_tasks(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage():
        from peftune.harness import check_harness, evaluate_tasks
        from peftune.reopen import find_trained, open_weights, opened

    with opened(only_json=parsed.json) as (world, display):
        folder, config = find_trained(parsed.model, parsed.config, needs_data=False)
        check_harness(config.task, parsed.include_path, world.ranks)
        with _only_json(parsed.json):
            scores = evaluate_tasks(open_weights(folder, config, world, display), parsed.tasks.split(","),
                                    parsed.include_path, batch_size=parsed.batch_size, limit=parsed.limit)
        if parsed.json:
            _print_json({"tasks": scores})
        else:
            for name, found in scores.items():
                display.table(name, ["", "value"], [[key, f"{value:.4f}"] for key, value in found.items()])
    return EXIT_DONE


def _predict(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage():
        from peftune.loop.finish import prediction_lines, prediction_table
        from peftune.loop.publish import write_text
        from peftune.reopen import opened, predict_file

    if os.path.exists(parsed.input) and os.path.exists(parsed.output) and os.path.samefile(parsed.input, parsed.output):
        raise MachineError(Fault(kind="environment", file=parsed.output, message="--output is the --input",
                                 mend="give another --output"))
    refuse_unwritable(parsed.output, "--output")
    with opened(only_json=False) as (world, display):
        records = predict_file(parsed.model, parsed.config, parsed.input, world, display)
        written = prediction_table if parsed.output.endswith(".csv") else prediction_lines
        if world.is_main:
            with writing_to(parsed.output, "--output"):
                write_text(Path(parsed.output), written(records))
            display.say(f"{counted(len(records), 'prediction')} in {parsed.output}")
    return EXIT_DONE


def _export(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage():
        from peftune.export import Wanted, export
        from peftune.reopen import opened

    with opened(only_json=parsed.json) as (world, display):
        wanted = Wanted(source=parsed.source, to=parsed.to, config=parsed.config, merge=parsed.merge, into=parsed.into,
                        dtype=parsed.dtype, shard_size=parsed.max_shard_size, tolerance=parsed.tolerance,
                        gguf=parsed.gguf, llama_cpp=parsed.llama_cpp)
        try:
            with _only_json(parsed.json):
                record = export(wanted, world, display)
        except ExportError as error:
            if parsed.json:
                faults = [fault.as_json() for fault in error.faults]
                _print_json({"published": False, "faults": faults})
            raise
        if parsed.json:
            _print_json(record)
        else:
            display.say(f"{record['kind']} in {parsed.to}, {record['dtype']}")
    return EXIT_DONE


def _report(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage():
        from peftune.report.page import write_comparison, write_report

    folders, to = [Path(run) for run in parsed.runs], Path(parsed.to) if parsed.to else None
    page, found = (write_report(folders[0], to) if len(folders) == 1
                   else write_comparison(folders, to or Path("comparison.html")))
    if parsed.json:
        _print_json(found)
    else:
        print(page)
    return EXIT_DONE


def _schema(parsed: argparse.Namespace) -> int:
    from peftune.config.schema import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))
    return EXIT_DONE


@contextlib.contextmanager
def _only_json(wanted: bool) -> Iterator[None]:
    """Keep standard output for the one object: libraries that log there when they are imported go to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def _print_json(value: object) -> None:
    """The one object of --json; where standard output is not UTF-8, in ASCII."""
    print(json.dumps(value, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))


if __name__ == "__main__":
    run()
