"""One bench for all tests of strategies: their runs share a launch for each strategy."""

from __future__ import annotations

import importlib.util
from subprocess import CompletedProcess

import pytest

from benchmarks.parity import Asked, Bench

CHAIN = ("ddp", "zero2", "fsdp2", "zero3", "zero1", "single")
"""One run goes on under these, one after another: so they are launched in this order."""

NEEDS_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                                        reason="needs the extra `quantization`")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tiny models and rows, and the runs of one process, each made once."""
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest, bench: Bench) -> dict[Asked, CompletedProcess[str]]:
    """How the runs have ended that the selected tests name in their parameter `asked`."""
    items = [item for item in request.session.items if "ran" in getattr(item, "fixturenames", ())
             and not any(marker.args[0] for marker in item.iter_markers("skipif"))]
    wanted = dict.fromkeys(one for item in items for one in item.callspec.params["asked"])
    bench.make_references([one.cell for one in wanted])
    return bench.run(sorted(wanted, key=lambda one: ("zero3-offload", *CHAIN).index(one.cell.strategy)))
