"""Trackers: what each has on disk after a run is the rows of metrics.jsonl."""

import json
import sqlite3
import struct

import pytest

from peftune.errors import MachineError
from peftune.observe.trackers import start_trackers
from tests.conftest import metric_rows, mostly_slow


def of_tensorboard(folder, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {(event.step, event.value) for event in events.Scalars("train/loss")}, "folder"


def of_wandb(folder, home):
    from wandb.proto.wandb_internal_pb2 import Record

    found, name = set(), ""
    for data in wandb_records(next((folder / "wandb").glob("offline-run-*/*.wandb")).read_bytes()):
        record = Record.FromString(data)
        name = record.run.display_name or name
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found |= {(row["_step"], row["train/loss"])} if "train/loss" in row else set()
    return found, name


def wandb_records(content, block=32768):
    """The records of a LevelDB log: checksum, length and kind, where 2 to 4 begin, continue and end a longer one."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def of_mlflow(folder, home):
    import mlflow

    client = mlflow.MlflowClient()
    run = client.search_runs([client.get_experiment_by_name("peftune").experiment_id])[0]
    assert run.data.params["train.batch_size"] == "8"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return {(row.step, row.value) for row in history}, run.info.run_name


def of_trackio(folder, home):
    rows = sqlite3.connect(home / "peftune.db").execute("select run_name, step, metrics from metrics").fetchall()
    found = {(step, json.loads(metrics).get("train/loss")) for _, step, metrics in rows}
    return {(step, loss) for step, loss in found if loss is not None}, rows[0][0]


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.parametrize("name", mostly_slow(READERS, "tensorboard"))
def test_a_tracker_has_the_rows_of_the_run_under_its_name(name, classify, train, tmp_path, monkeypatch):
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "home"),
                       "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)  # trackio reads its folder as it is imported
    folder = train({**classify, "log": {"every_steps": 1, "trackers": [name]}}, "train.max_steps=3", name="folder")
    found, named = READERS[name](folder, tmp_path / "home")
    rows = {(row["step"], row["loss"]) for row in metric_rows(folder, "train")}
    assert {step for step, _ in found} == {1, 2, 3} and named == "folder"
    assert dict(found) == pytest.approx(dict(rows), rel=1e-6)


def test_a_tracker_that_cannot_begin_is_named_with_the_mend(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **others: (_ for _ in ()).throw(wandb.errors.UsageError("No API key")))
    with pytest.raises(MachineError, match=r"(?s)wandb cannot begin: No API key.*WANDB_MODE=offline"):
        start_trackers(("wandb",), tmp_path, {})


