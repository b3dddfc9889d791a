"""`peftune launch hosts` on two hosts: network namespaces that reach each other alone, through a command for ssh."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster.conftest import wait_for
from tests.conftest import ROOT, metric_rows, summary, write_config

pytestmark = pytest.mark.slow


def launched(config, hosts, *overrides, said):
    first, second, ssh = hosts
    words = [sys.executable, "-m", "peftune", "launch", "hosts", config, *overrides, "--hosts", f"{first},{second}",
             "--ssh", ssh, "--port", "29533"]
    with said.open("w") as file:
        return subprocess.Popen([str(word) for word in words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                env={**os.environ, "ACCELERATE_USE_CPU": "true"})


def test_two_hosts_train_together_stop_when_told_and_go_on(two_hosts, classify, tmp_path):
    classify["train"]["max_steps"] = 60
    classify["checkpoint"] = classify["evaluation"] = {"every_steps": 50}
    config, folder = write_config(classify, tmp_path / "c"), tmp_path / "run"
    said = tmp_path / "said"
    running = launched(config, two_hosts, said=said)
    wait_for(lambda: (folder / "metrics.jsonl").is_file() and len(metric_rows(folder, "train")) > 2, f"steps: {said}")
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 75, said.read_text()
    assert "[10.77.0.1] ended with 75" in said.read_text() and "[10.77.0.2] ended with 75" in said.read_text()
    done = int(re.search(r"USR1 came: (\d+) of 60 steps are done", said.read_text())[1])

    running = launched(config, two_hosts, said=said)
    assert running.wait(120) == 0, said.read_text()
    text = said.read_text()
    assert f"[10.77.0.1] continuing after step {done} from" in text
    assert "GLOO_SOCKET_IFNAME=pt77a" in text and "GLOO_SOCKET_IFNAME=pt77b" in text
    assert summary(folder)["world_size"] == 2 and summary(folder)["steps"] == 60
    assert [row["step"] for row in metric_rows(folder, "train")] == list(range(1, 61))


def test_a_link_that_is_cut_ends_both_hosts_in_bounded_time_and_each_says_whom_it_misses(two_hosts, classify, tmp_path):
    classify["train"]["max_steps"] = 4000
    classify["checkpoint"] = classify["evaluation"] = {"every_steps": 3000}
    config, folder = write_config(classify, tmp_path / "c"), tmp_path / "run"
    said = tmp_path / "said"
    running = launched(config, two_hosts, "hang_timeout=5s", said=said)
    wait_for(lambda: (folder / "metrics.jsonl").is_file() and len(metric_rows(folder, "train")) > 2, f"steps: {said}")
    time.sleep(2)  # each has said to the other that it is in a step
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "pt77a", "down"], check=True)
    before = time.monotonic()
    assert running.wait(60) == 1, said.read_text()
    assert time.monotonic() - before < 30
    text = said.read_text()
    assert re.search(r"\[10\.77\.0\.1\] error: rank 1 on \S+ \(process \d+\), in step \d+, has not been heard of", text)
    assert re.search(r"\[10\.77\.0\.2\] error: 10\.77\.0\.1, where the ranks have met, has not answered", text)
