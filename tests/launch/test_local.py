"""Running a command to its end, or to the end of whoever asked for it. torchrun itself: tests/training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch import local
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import SHUTDOWN_SECONDS
from embed_pipeline.tracking.runs import INTERRUPTED_SECONDS

# A parent that ignores SIGTERM with a child in a session of its own, as torchrun's workers have, and a grandchild that
# has lost its parent, as what a worker started may; all three write their ids.
STUBBORN = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    start = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); print(p.pid)"
    )
    orphan = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True).stdout
    with open(sys.argv[1], "w") as file:
        file.write(f"{os.getpid()} {child.pid} {orphan}")
    time.sleep(60)
    """
)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process is gone (or a zombie that nobody has asked for) within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def ids_in(path: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while not (path.is_file() and len(path.read_text().split()) == count):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(id) for id in path.read_text().split()]


@pytest.mark.parametrize("left", ["", '{"message": {"mess', "[]", "{}"])
def test_an_error_file_cut_short_leaves_the_exit_code_to_tell(left: str, tmp_path: Path) -> None:
    code = "import os; open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(os.environ['LEFT']); os._exit(7)"
    with pytest.raises(TrainingError, match="ended with exit code 7, and no rank left an error"):
        run_local(python(code), env={"LEFT": left}, error_file=tmp_path / "error.json")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "ended with exit code 3, and no rank left an error"),
        ("import os; os.kill(os.getpid(), 9)", "by SIGKILL: killed, probably because the machine ran out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "by SIGSEGV"),
    ],
)
def test_without_a_recorded_error_the_exit_code_is_explained(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run_local(python(code), env={}, error_file=tmp_path / "error.json")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ("TrainingError: too few rows. Bring more", "^too few rows. Bring more$"),
        ("ValueError: no such thing", "(?s)^the job failed with ValueError: no such thing\n\nTraceback of it$"),
    ],
)
def test_the_recorded_error_of_a_rank_is_the_error(tmp_path: Path, recorded: str, message: str) -> None:
    content = {"message": {"message": recorded, "extraInfo": {"py_callstack": "Traceback of it", "timestamp": "1"}}}
    code = "import os, sys; open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(sys.argv[1]); sys.exit(1)"
    with pytest.raises(TrainingError, match=message):
        run_local(python(code, json.dumps(content)), env={}, error_file=tmp_path / "error.json")


def test_a_process_that_did_not_come_is_told_as_such(tmp_path: Path) -> None:
    gloo = "RuntimeError: [unbound_buffer.cc:129] Timed out waiting 90000ms for send operation to complete"
    content = {"message": {"message": gloo, "extraInfo": {}}}
    code = "import os, sys; open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(sys.argv[1]); sys.exit(1)"
    with pytest.raises(TrainingError, match=r"did not take part in an exchange within 1\.5 minutes") as raised:
        run_local(python(code, json.dumps(content)), env={}, error_file=tmp_path / "error.json")
    assert raised.value.passing

    # NCCL's watchdog says so in the log alone, and aborts the process.
    log = tmp_path / "logs" / "run" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=9, "
        "NumelOut=9, Timeout(ms)=600000) ran for 600029 milliseconds before timing out.\n"
    )
    aborted = {"message": "rank 0 was ended by SIGABRT", "exit_code": -6}
    with pytest.raises(TrainingError, match="did not take part in an exchange within 10 minutes"):
        run_local(python(code, json.dumps(aborted)), env={}, error_file=tmp_path / "error.json")
    log.write_text("free(): invalid pointer\n")
    with pytest.raises(TrainingError, match="rank 0 was ended by SIGABRT"):
        run_local(python(code, json.dumps(aborted)), env={}, error_file=tmp_path / "error.json")


def test_an_error_file_of_an_earlier_run_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text('{"message": "old"}')
    with pytest.raises(TrainingError, match="exit code 1"):
        run_local(python("raise SystemExit(1)"), env={}, error_file=tmp_path / "error.json")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_whatever_is_raised_meanwhile_ends_the_whole_tree_within_fifteen_seconds(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    interrupted: list[float] = []

    def interrupt() -> None:
        ids_in(tmp_path / "ids", 3)
        interrupted.append(time.monotonic())
        raise interruption

    with pytest.raises(interruption):
        run_local(
            python(STUBBORN, str(tmp_path / "ids")), env={}, error_file=tmp_path / "error.json", on_poll=interrupt
        )
    seconds = time.monotonic() - interrupted[0]
    assert [pid for pid in ids_in(tmp_path / "ids", 3) if not ended(pid, 0.1)] == []
    assert seconds < 12  # 9 by the deadlines


def test_the_deadlines_of_a_cancel_follow_each_other() -> None:
    """torchrun ends its workers, then we end torchrun, then whoever cancelled sees it; with time for a busy machine."""
    assert SHUTDOWN_SECONDS + 2 <= local.TERMINATE_SECONDS
    assert local.TERMINATE_SECONDS + local.KILL_SECONDS + INTERRUPTED_SECONDS <= 14


def test_what_a_failed_command_left_behind_is_ended(tmp_path: Path) -> None:
    code = STUBBORN.replace("time.sleep(60)\n", "os._exit(3)\n")  # the last one, the command's own
    with pytest.raises(TrainingError, match="exit code 3"):
        run_local(python(code, str(tmp_path / "ids")), env={}, error_file=tmp_path / "error.json")
    assert [pid for pid in ids_in(tmp_path / "ids", 3) if not ended(pid, 0.1)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_killing_the_launcher_ends_the_command(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys; from pathlib import Path; from embed_pipeline.launch.local import run_local
        command = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} {os.getppid()}'); time.sleep(60)"
        folder = Path(sys.argv[1])
        run_local([sys.executable, "-c", command, str(folder / "ids")], env={}, error_file=folder / "error.json")
        """
    )
    launcher = subprocess.Popen(python(code, str(tmp_path)))
    command, parent = ids_in(tmp_path / "ids", 2)
    assert parent == launcher.pid
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert ended(command)


# Each process writes its id below the folder that is its last argument.
FAMILY = textwrap.dedent(
    """
    import multiprocessing, os, sys, time
    from pathlib import Path
    from embed_pipeline.launch.parent_death import end_with_parent

    def child(folder):
        end_with_parent()
        Path(folder, "child").write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(60)

    def parent(start, folder):
        process = multiprocessing.get_context(start).Process(target=child, args=(folder,))
        process.start()
        process.join()

    if __name__ == "__main__":
        end_with_parent()  # nobody's child: without effect
        parent(*sys.argv[1:])
    """
)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_step_ends_with_the_process_of_its_run(start: str, tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    run = subprocess.Popen([sys.executable, str(script), start, str(tmp_path)])
    deadline = time.monotonic() + 20
    while not ((tmp_path / "child").is_file() and (tmp_path / "child").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    step, parent = map(int, (tmp_path / "child").read_text().split())  # a server is the parent of what it forks
    assert ended(step)
    assert ended(parent)


@pytest.mark.parametrize(
    ("recorded", "passing"),
    [
        ({"message": "rank 0 was ended by SIGKILL: killed", "exit_code": -9}, True),
        ({"message": "rank 0 was ended by SIGSEGV", "exit_code": -11}, False),
        ({"message": {"message": "ConnectionResetError: reset by peer"}}, True),
        ({"message": {"message": "ValueError: no such thing"}}, False),
        ({"message": {"message": "TrainingError: the loss is NaN"}}, False),
    ],
)
def test_it_is_told_whether_trying_again_may_help(tmp_path: Path, recorded: object, passing: bool) -> None:
    code = "import os, sys; open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(sys.argv[1]); sys.exit(1)"
    with pytest.raises(TrainingError) as raised:
        run_local(python(code, json.dumps(recorded)), env={}, error_file=tmp_path / "error.json")
    assert raised.value.passing == passing


def test_a_command_can_be_ended_where_the_launcher_itself_ignores_it(tmp_path: Path) -> None:
    """As under Dagster in a script's background: the shell has it ignore SIGINT, which it takes for SIGTERM as well."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(TrainingError, match="SIGTERM"):
            run_local(python("import os; os.kill(os.getpid(), 15)"), env={}, error_file=tmp_path / "error.json")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("sign", "passing"), [(signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGSEGV, False)])
def test_a_torchrun_that_is_ended_by_another_may_be_tried_again(
    tmp_path: Path, sign: signal.Signals, passing: bool
) -> None:
    code = f"import os; os.kill(os.getpid(), {int(sign)})"
    with pytest.raises(TrainingError) as raised:
        run_local(python(code), env={}, error_file=tmp_path / "error.json")
    assert raised.value.passing == passing
