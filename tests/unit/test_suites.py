"""`peftune bench`: which suite runs, and with what."""

import pytest

from peftune.cli import main, parse


@pytest.mark.parametrize(("words", "suite", "rest"), [
    ([], "throughput", []), (["parity"], "parity", []), (["throughput", "shapes", "--repeats", "1"], "throughput",
                                                         ["shapes", "--repeats", "1"]),
    (["parity", "--help"], "parity", ["--help"]),
])
def test_bench_without_a_suite_is_throughput_and_words_behind_a_suite_are_its_own(words, suite, rest):
    parsed = parse(["bench", *words])
    assert (parsed.suite, parsed.words) == (suite, rest)


def test_the_help_of_bench_says_what_runs_without_a_suite(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert not stopped.value.code and "default: throughput" in said and "[SUITE]" in said


def test_a_suite_that_is_none_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "nonsense"])
    assert stopped.value.code == 2 and "throughput" in capsys.readouterr().err
