"""Jobs for several machines, as they are written; tests/cluster runs them."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from peftune.cli import main
from peftune.cluster import hosts
from peftune.cluster.hosts import launch_lines, parse_hosts
from peftune.cluster.job import check_job
from peftune.cluster.kubernetes import KINDS
from peftune.config.load import load
from peftune.errors import ConfigError, Fault, MachineError, guarded
from peftune.parallel.launcher import STOP_FILE, choose_launch, node_of
from peftune.parallel.network import interface_towards, interface_variables
from tests.conftest import ROOT, write_config

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def rendered(capsys, *words):
    assert main(["launch", *map(str, words)]) == 0
    return capsys.readouterr().out


def objects(capsys, *words):
    text = rendered(capsys, "kubernetes", QUICKSTART, "--image", "i:1", "--claim", "disk:/data", *words)
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def option(words, name):
    return words[words.index(name) + 1]


def test_an_sbatch_script_has_the_options_and_settings_that_were_given(capsys):
    script = rendered(capsys, "slurm", QUICKSTART, "--nodes", 4, "--gpus-per-node", 8, "--strategy", "zero3", "--time",
                      "1-00:00:00", "--partition", "big", "--account", "us", "--option", "exclusive", "--option",
                      "qos=high", "--notice", 240, "--interface", "ib0", "train.num_epochs=2", "output_dir=/s h/x")
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2]
                   for line in script.splitlines() if line.startswith("#SBATCH"))
    assert options == {
        "job-name": "quickstart", "nodes": "4", "ntasks-per-node": "1", "time": "1-00:00:00", "signal": "B:USR1@240",
        "requeue": "", "open-mode": "append", "output": "%x-%j.log", "chdir": str(Path.cwd()), "gpus-per-node": "8",
        "partition": "big", "account": "us", "exclusive": "", "qos": "high"}
    for line in ("strategy=zero3", "processes_per_node=8", f"python={sys.executable}", "interface=ib0",
                 f"arguments=({QUICKSTART} train.num_epochs=2 'output_dir=/s h/x')"):
        assert f"\n{line}\n" in script


def test_a_folder_and_an_option_with_blanks_are_one_word_each_to_sbatch(capsys, tmp_path, monkeypatch):
    (folder := tmp_path / "it's mine").mkdir()
    monkeypatch.chdir(folder)
    script = rendered(capsys, "slurm", QUICKSTART, "--nodes", 1, "--gpus-per-node", 0, "--option", "comment=two words")
    words = [word for line in script.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
    assert f"--chdir={folder}" in words and "--comment=two words" in words
    assert all(word.startswith("--") for word in words)


@pytest.mark.parametrize("words", [(), ("--container", "image.sif"), ("--container", "registry/x:1")])
def test_every_sbatch_script_is_bash_and_so_is_the_template(words, capsys):
    script = rendered(capsys, "slurm", QUICKSTART, "--nodes", 2, "--gpus-per-node", 0, *words)
    for text in (script, (ROOT / "launch" / "slurm" / "train.sbatch").read_text()):
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert not done.stderr and not done.returncode
    assert "gpus-per-node" not in "".join(line for line in script.splitlines() if line.startswith("#SBATCH"))
    assert ("python=python3\n" in script) == bool(words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rendered_here", [True, False], ids=["rendered", "template"])
def test_manifests_are_what_the_kubernetes_api_takes_field_by_field(kind, rendered_here, capsys):
    """What comes back from the API's own models is equal only if they know every field and its type."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason='pip install "peftune[dev]"')
    known = {"Service": models.IoK8sApiCoreV1Service, "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
             "Job": models.IoK8sApiBatchV1Job, "JobSet": models.JobsetV1alpha2JobSet,
             "TrainJob": models.TrainerV1alpha1TrainJob}
    found = objects(capsys, "--kind", kind, "--nodes", 3, "--gpus-per-node", 4) if rendered_here else {
        part["kind"]: part for part in yaml.safe_load_all((ROOT / f"launch/kubernetes/{kind}.yaml").read_text())}
    assert len(found) == (3 if kind == "job" else 2)
    for name, manifest in found.items():
        assert known[name].from_dict(manifest).to_dict() == manifest
    broken = json.loads(json.dumps(found["ConfigMap"]))
    broken["dta"] = broken.pop("data")
    assert known["ConfigMap"].from_dict(broken).to_dict() != broken


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_kubernetes_job_has_one_numbered_pod_a_node_that_finds_the_first_by_its_service(nodes, capsys):
    found = objects(capsys, "--nodes", nodes, "--gpus-per-node", 4, "--name", "My run_1")
    job, service = found["Job"]["spec"], found["Service"]
    pod = job["template"]["spec"]
    name = service["metadata"]["name"]
    assert name == pod["subdomain"] == found["Job"]["metadata"]["name"] == "my-run-1"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", nodes, nodes)
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    container = pod["containers"][0]
    words = container["command"]
    assert words[:5] == ["python3", "-m", "peftune", "train", "/etc/peftune/config.yaml"]
    assert (option(words, "--processes"), option(words, "--nodes")) == (str(4 * nodes), str(nodes))
    assert option(words, "--node-rank") == "$(JOB_COMPLETION_INDEX)"
    assert option(words, "--main-node") == "my-run-1-0.my-run-1:29500"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    exits = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}
    assert exits == {"Ignore": [75], "FailJob": [2, 3]}
    assert all(rule["onExitCodes"]["containerName"] == container["name"]
               for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule)


@pytest.mark.parametrize("kind", KINDS)
def test_the_objects_of_a_config_whose_name_begins_with_a_digit_have_names_that_services_may_have(kind, capsys):
    for given in ("7b-lora", 50 * "7"):
        found = objects(capsys, "--kind", kind, "--nodes", 2, "--gpus-per-node", 0, "--name", given)
        names = {manifest["metadata"]["name"] for manifest in found.values()}
        (name,) = names
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])", name) and given[:7] in name
        assert re.search(rf"{name}[-a-z0-9]*-0\.{name}:29500", json.dumps(list(found.values())))


def test_the_config_travels_with_every_override_applied(capsys, tmp_path):
    found = objects(capsys, "--nodes", 1, "--gpus-per-node", 0, "train.num_epochs=7", "output_dir=runs/seven")
    text = found["ConfigMap"]["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text)
    assert load([str(tmp_path / "config.yaml")]) == load([QUICKSTART, "train.num_epochs=7", "output_dir=runs/seven"])


def test_a_jobset_starts_all_pods_again_after_a_stop_without_counting_it(capsys):
    spec = objects(capsys, "--kind", "jobset", "--nodes", 2, "--gpus-per-node", 1)["JobSet"]["spec"]
    job = spec["replicatedJobs"][0]
    inner = job["template"]["spec"]
    assert inner["backoffLimit"] == 0 and inner["completions"] == inner["parallelism"] == 2
    assert spec["network"]["subdomain"] == "quickstart" and job["replicas"] == 1
    words = inner["template"]["spec"]["containers"][0]["command"]
    assert option(words, "--main-node") == f"quickstart-{job['name']}-0-0.quickstart:29500"
    rules = spec["failurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"]
    assert "exit code 75 " in rules[0]["onJobFailureMessagePatterns"]


def test_an_output_that_would_be_lost_with_its_pod_is_refused(capsys):
    with pytest.raises(MachineError, match="lies outside /data"):
        objects(capsys, "--nodes", 1, "--gpus-per-node", 0, "output_dir=/elsewhere/run")


@pytest.mark.parametrize(("words", "why"), [
    (("train.batchsize=3",), "unknown key"), (("--nodes", "0"), "use 1 or more"),
    (("--strategy", "zero9"), "this version has"), (("--strategy", "single"), "runs one process"),
])
def test_a_job_that_cannot_run_is_refused_before_it_is_written(words, why, tmp_path):
    line = ["launch", "slurm", QUICKSTART, "--nodes", "2", "--gpus-per-node", "1", "--to", str(tmp_path / "x"), *words]
    with pytest.raises((ConfigError, MachineError), match=why):
        main(line)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("place", "program", "answer"), [("slurm", "sbatch", "17"), ("kubernetes", "kubectl", "ok")])
def test_submit_hands_over_what_is_printed_otherwise(place, program, answer, tmp_path, monkeypatch, capsys):
    words = [place, QUICKSTART, "--nodes", 2, "--gpus-per-node", 1]
    words += ["--image", "i", "--claim", "c"] if place == "kubernetes" else []
    text = rendered(capsys, *words)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=f"--submit needs {program}"):
        main(["launch", *map(str, words), "--submit"])
    script = tmp_path / program
    script.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\n/bin/cat > {tmp_path}/got; echo {answer}\n")
    script.chmod(0o755)
    assert main(["launch", *map(str, words), "--submit"]) == 0
    assert (tmp_path / "got").read_text() == text


def test_a_launch_command_loads_neither_torch_nor_numpy_nor_transformers():
    script = ("import sys; from peftune.cli import main; main(sys.argv[1:]); "
              "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)")
    words = [sys.executable, "-c", script, "launch", "slurm", QUICKSTART, "--nodes", "2", "--gpus-per-node", "8"]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_fault_that_another_process_takes_over_says_the_same():
    error = MachineError([Fault(kind="environment", message=f"{word} is wrong", mend="mend it") for word in "ab"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert type(again) is MachineError and again.faults == error.faults and str(again) == str(error)


@pytest.mark.parametrize(("given", "name"), [
    ("My run_1", "my-run-1"), ("2024-10 chat", "peftune-2024-10-chat"), ("_", "peftune"), ("a" * 50, "a" * 40),
    ("1" * 50, "peftune-" + "1" * 32)])
def test_a_job_s_name_is_one_that_a_kubernetes_service_may_have(given, name):
    """RFC 1035: until Kubernetes 1.36 a Service's name begins with a letter."""
    assert check_job([QUICKSTART], name=given, nodes=2, gpus_per_node=8, strategy="auto").name == name


def test_hosts_are_names_with_equal_numbers_of_processes():
    assert parse_hosts("a,b") == (["a", "b"], 1) and parse_hosts("a:8, me@b:8") == (["a", "me@b"], 8)
    for text, why in (("a:2,b:4", "unequal"), ("a,a", "different"), ("a:x", "different"), ("", "different")):
        with pytest.raises(MachineError, match=why):
            parse_hosts(text)


def test_each_host_gets_a_line_of_its_own_and_one_that_passes_signals_on():
    job = check_job([QUICKSTART], name=None, nodes=2, gpus_per_node=8, strategy="auto")
    first, second = launch_lines(job, ["me@a", "b"], port=1234, ssh="ssh -p 22", python="py", interface="ib0")
    assert first.command[:4] == ("ssh", "-p", "22", "me@a") and second.command[3] == "b"
    for rank, line in enumerate((first, second)):
        assert line.command[4].endswith(
            f"exec py -m peftune train {QUICKSTART} --strategy ddp --processes 16 --nodes 2 --node-rank {rank} "
            "--main-node a:1234 --interface ib0")
        assert line.tell[-1] == f"kill -{{}} $(cat ~/.peftune-1234-{rank}.pid)"
        assert line.end[:4] == line.tell[:4] and f"$(cat ~/.peftune-1234-{rank}.pid)" in line.end[-1]


def test_the_machines_of_a_run_get_launch_lines_that_differ_in_their_rank(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    lines = [str(choose_launch("auto", 4, ["c.yaml"], node_of(2, rank, "127.0.0.1:77", None), "logs"))
             for rank in (0, 1)]
    assert "--num_processes 4 --num_machines 2 --machine_rank 0 --main_process_ip 127.0.0.1" in lines[0]
    assert "--rdzv_backend static --log_dir logs/node-0 --tee 3" in lines[0]
    assert lines[1] == lines[0].replace("--machine_rank 0", "--machine_rank 1").replace(
        "node-0", "node-1").replace("node 0", "node 1")


@pytest.mark.parametrize(("node", "processes", "why"), [
    ((2, None, "a:1", None), 2, "--node-rank None of 2"), ((2, 2, "a:1", None), 2, "0 to 1"),
    ((2, 0, None, None), 2, "HOST:PORT"), ((2, 0, "a", None), 2, "HOST:PORT"),
    ((2, 0, "127.0.0.1:77", None), 3, "each must run as many"),
    ((2, 0, "127.0.0.1:77", "nothing0"), 2, "this machine has"),
])
def test_half_a_description_of_the_machines_is_refused(node, processes, why, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(MachineError, match=why):
        choose_launch("ddp", processes, ["c.yaml"], node_of(*node))


def test_an_interface_that_somebody_has_chosen_is_not_replaced(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert interface_variables("127.0.0.1", None) == {}
    assert interface_variables("127.0.0.1", "lo") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def test_loopback_is_never_taken_for_the_way_to_other_machines():
    assert interface_towards("127.0.0.1") != "lo"


@pytest.mark.slow
def test_a_stop_that_was_asked_for_before_anything_ran_is_not_lost(command, classify, tmp_path):
    """A cluster's warning may come in a job's first second."""
    stop = tmp_path / "stop"
    stop.touch()
    config = write_config(classify, tmp_path / "c")
    done = command("-m", "peftune", "train", config, env={STOP_FILE: str(stop)})
    assert done.returncode == 75 and "stopped" in done.stderr and not (tmp_path / "run").exists()


def test_signals_reach_the_lines_of_all_hosts(tmp_path):
    """With a shell in place of ssh, and a process that waits in place of a launcher."""
    script = f"""
import sys
from peftune.cluster.hosts import Line, run_lines
wait = "echo $$ > {tmp_path}/%s; trap 'echo told; exit 75' USR1; while :; do sleep 0.05; done"
lines = [Line(n, ("sh", "-c", wait % n), ("sh", "-c", "kill -{{}} $(cat {tmp_path}/%s)" % n), ()) for n in "ab"]
sys.exit(run_lines(lines, others_s=300))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 30
    while not all((tmp_path / name).is_file() and (tmp_path / name).read_text() for name in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # until both have set their traps
    os.kill(process.pid, signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and sorted(said.splitlines()) == ["[a] told", "[b] told"]


@pytest.mark.parametrize("ignores", [False, True], ids=["that ends when it is told", "that does not"])
@pytest.mark.slow
def test_a_machine_that_does_not_notice_the_end_of_another_is_ended_with_its_processes(ignores, tmp_path, monkeypatch):
    """With a shell in place of ssh, which leaves what it has started behind as ssh does."""
    monkeypatch.setattr(hosts, "TERM_S", 1.0)
    pid, child, told = tmp_path / "pid", tmp_path / "child", tmp_path / "told"
    react = f"echo > {told}; {'' if ignores else 'kill $child; exit 75'}"
    launcher = tmp_path / "launcher"
    launcher.write_text(f"trap '{react}' TERM\nsetsid sleep 600 &\nchild=$!\necho $child > {child}\n"
                        f"echo $$ > {pid}\nwhile :; do sleep 0.1; done\n")
    started = f"setsid sh {launcher} > /dev/null 2>&1 & while kill -0 $!; do sleep 0.1; done 2> /dev/null"
    lines = [hosts.Line("a", ("sh", "-c", f"until [ -s {pid} ]; do sleep 0.1; done; sleep 0.2; exit 4"), (), ()),
             hosts.Line("b", ("sh", "-c", started), ("sh", "-c", f"kill -{{}} $(cat {pid})"),
                        ("sh", "-c", hosts.END % pid))]
    hosts.run_lines(lines, others_s=0.5)
    assert told.is_file()
    for file in (pid, child):
        stat = Path(f"/proc/{file.read_text().strip()}/stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize("kind", KINDS)
def test_pods_reserve_the_processors_and_the_memory_that_were_asked_for(kind, capsys):
    words = ("--kind", kind, "--nodes", 2, "--gpus-per-node", 4)
    models = pytest.importorskip("kubeflow_trainer_api.models", reason='pip install "peftune[dev]"')
    known = {"Job": models.IoK8sApiBatchV1Job, "JobSet": models.JobsetV1alpha2JobSet,
             "TrainJob": models.TrainerV1alpha1TrainJob}
    plain, found = objects(capsys, *words), objects(capsys, *words, "--cpu", 64, "--memory", "500Gi")
    name = list(plain)[-1]
    reserved = {"cpu": "64", "memory": "500Gi"}
    wanted = {"limits": {"nvidia.com/gpu": 4, **reserved}, "requests": reserved}
    assert yaml.safe_load(json.dumps(plain).replace('{"limits": {"nvidia.com/gpu": 4}}', json.dumps(wanted))) == found
    assert found != plain and known[name].from_dict(found[name]).to_dict() == found[name]
    for wrong in (("--memory", "500"), ("--cpu", "many")):
        with pytest.raises(MachineError, match=f"{wrong[0]} {wrong[1]}: not a quantity"):
            objects(capsys, *words, *wrong)


def test_a_container_sees_the_mounts_and_an_output_outside_of_them_is_refused(capsys):
    words = ("slurm", QUICKSTART, "--nodes", 2, "--gpus-per-node", 1, "output_dir=/data/runs/x")
    rendered(capsys, *words)  # the machines share it
    for image in ("i.sif", "registry/i:1"):
        with pytest.raises(MachineError, match=r"(?s)output_dir = /data/runs/x lies outside .*--mount /data/runs"):
            rendered(capsys, *words, "--container", image)
        script = rendered(capsys, *words, "--container", image, "--mount", "/data", "--mount", "/a b:/b")
        assert "\nmounts='/data:/data,/a b:/b'\n" in script
        rendered(capsys, *words[:-1], "output_dir=runs/x", "--container", image)
    with pytest.raises(MachineError, match="lies outside"):
        rendered(capsys, *words[:-1], "output_dir=../x", "--container", "i.sif")
    with pytest.raises(MachineError, match="--mount without --container"):
        rendered(capsys, *words, "--mount", "/data")


@pytest.mark.parametrize(("image", "wanted"), [
    ("i.sif", "apptainer exec --nv --bind {0},/data:/data --pwd {0} i.sif"),
    ("reg/i:1", "--container-image=reg/i:1 --container-mounts={0}:{0},/data:/data --container-workdir={0}")])
def test_the_script_hands_the_mounts_to_the_container_and_waits_longer_than_the_watchdogs(
        image, wanted, capsys, tmp_path, monkeypatch):
    script = rendered(capsys, "slurm", QUICKSTART, "--nodes", 1, "--gpus-per-node", 1, "--container", image,
                      "--mount", "/data", "hang_timeout=20m")
    for name, text in (("srun", 'echo "$@"'), ("scontrol", "echo node1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True, cwd=tmp_path, env={
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NAME": "j", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"})
    assert wanted.format(tmp_path) in done.stdout and "--wait=1500 " in done.stdout


@pytest.mark.parametrize("time", ["abc", "5m", "1-", "1:2:3:4", "1:2-3", " 60", "٣٠", ""])
def test_a_time_that_slurm_does_not_take_is_refused_with_the_forms_that_it_takes(time, capsys):
    line = ["launch", "slurm", QUICKSTART, "--nodes", "2", "--gpus-per-node", "8"]
    for words in (["--time", time], ["--option", f"time={time}"]):
        assert guarded(main, [*line, *words]) == 2
        said = capsys.readouterr()
        assert not said.out and f"--time {time}: " in said.err
        assert "minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED or INFINITE" in said.err


@pytest.mark.parametrize("time", ["4", "3:01", "0:04:00", "1-0", "1-0:0", "1-00:00:00", "unlimited", "INFINITE", "0"])
def test_a_time_above_the_notice_is_taken_in_each_form_of_slurms(time, capsys):
    """Slurm rounds up to minutes, and takes 0 for no limit."""
    assert f"#SBATCH --time={time}\n" in rendered(
        capsys, "slurm", QUICKSTART, "--nodes", 2, "--gpus-per-node", 8, "--time", time)


@pytest.mark.parametrize(("words", "said"), [
    (("--time", "00:02:00"), r"--time 00:02:00 is 120 s, --notice 180(.|\n)*--notice below 120"),
    (("--time", "3"), "--time 3 is 180 s, --notice 180"), (("--time", "2:01"), "--time 2:01 is 180 s, --notice 180"),
    (("--time", "0-1", "--notice", "3600"), "--time 0-1 is 3,600 s, --notice 3600"),
    (("--notice", "60000", "--option", "time=60"), "--time 60 is 3,600 s, --notice 60000"),
    (("--time", "1", "--option", "signal=B:USR1"), "--time 1 is 60 s, --notice 60"),
    (("--notice", "0"), "--notice 0: (.|\n)*1 to 65535"), (("--notice", "-5"), "--notice -5: "),
    (("--time", "UNLIMITED", "--notice", "65536"), "--notice 65536: "),
])
def test_a_warning_that_slurm_cannot_give_between_the_begin_and_the_limit_is_refused(words, said, capsys):
    with pytest.raises(MachineError, match=said):
        rendered(capsys, "slurm", QUICKSTART, "--nodes", 2, "--gpus-per-node", 8, *words)


@pytest.mark.parametrize("kind", KINDS)
def test_without_image_and_claim_manifests_hold_words_that_kubernetes_refuses_and_the_options_are_said(kind, capsys):
    line = ["launch", "kubernetes", QUICKSTART, "--nodes", "2", "--gpus-per-node", "8", "--kind", kind]
    assert main(line) == 0
    said = capsys.readouterr()
    text = json.dumps(list(yaml.safe_load_all(said.out)))
    assert '"image": "IMAGE-WITH-PEFTUNE"' in text and '"claimName": "A-CLAIM-THAT-ALL-PODS-SHARE"' in text
    assert len(said.err.splitlines()) == 1 and "--image" in said.err and "--claim" in said.err
    assert main([*line, "--image", "i:1"]) == 0
    said = capsys.readouterr()
    assert '"image": "i:1"' in json.dumps(list(yaml.safe_load_all(said.out)))
    assert "--claim" in said.err and "--image" not in said.err
    assert main([*line, "--image", "i:1", "--claim", "c"]) == 0
    assert not capsys.readouterr().err
    with pytest.raises(MachineError, match="lies outside /workspace"):
        main([*line, "output_dir=/elsewhere/run"])


@pytest.mark.parametrize(("words", "missing"), [
    ((), "--image and --claim"), (("--image", "i"), "--claim"), (("--claim", "c"), "--image"),
    (("--image", "i", "--claim", ":/data"), "--claim"),
])
def test_a_job_without_image_or_claim_is_not_submitted(words, missing, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = ["launch", "kubernetes", QUICKSTART, "--nodes", "2", "--gpus-per-node", "8", "--submit"]
    assert guarded(main, [*line, *words]) == 2
    assert f"--submit needs {missing}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["%j", "a\\b"])
def test_a_folder_that_slurm_would_take_for_a_pattern_is_refused(name, capsys, tmp_path, monkeypatch):
    words = ("slurm", QUICKSTART, "--nodes", 2, "--gpus-per-node", 8)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(MachineError, match=r"for a pattern(.|\n)*--option chdir="):
        rendered(capsys, *words)
    assert f"#SBATCH --chdir={tmp_path}\n" in rendered(capsys, *words, "--option", f"chdir={tmp_path}")
