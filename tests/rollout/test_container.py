"""plugins/sandboxes/container.py and choice.py: the command line, and what is refused.

NEXTSTATE_TEST_CONTAINER=podman:IMAGE also runs commands in real containers of an image on this
machine that has bash, tar, timeout and python3.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.errors import ConfigError, RolloutError, StartError
from plugins.environments.terminal import TerminalKind
from plugins.sandboxes.bubblewrap import Bubblewrap
from plugins.sandboxes.choice import make_sandbox
from plugins.sandboxes.container import Container
from plugins.sandboxes.protocol import Limits, Ran

SMALL = Limits(wall_s=3, cpu_s=2, memory_mb=256, processes=24, file_mb=1, folder_mb=4, grace_s=60)
REAL = os.environ.get("NEXTSTATE_TEST_CONTAINER", "")
needs_container = pytest.mark.skipif(not REAL, reason="needs NEXTSTATE_TEST_CONTAINER=podman:IMAGE")


@pytest.mark.parametrize("program", ["docker", "podman"])
def test_the_command_line_shuts_the_container(program: str) -> None:
    box = make_sandbox(f"{program}:localhost/tools:1", SMALL)
    assert isinstance(box, Container)
    argv = box.argv("nextstate-1", b"ls", {"SEED": "7"})
    assert argv[:2] == [program, "run"]
    image = argv.index("localhost/tools:1")
    options = [str(part) for part in argv[2:image]]
    assert {"--rm", "--interactive", "--read-only"} < {*options}
    pairs = {*itertools.pairwise(options)}
    folder = "rw,exec,nosuid,nodev,mode=1777,size=4m" + ",notmpcopyup" * (program == "podman")
    assert pairs >= {
        ("--name", "nextstate-1"),
        ("--pull", "never"),
        ("--network", "none"),
        ("--user", "65534:65534"),
        ("--cap-drop", "ALL"),
        ("--security-opt", "no-new-privileges"),
        ("--pids-limit", "32"),
        ("--memory", "520m"),
        ("--tmpfs", f"/task:{folder}"),
        ("--tmpfs", f"/tmp:{folder}"),
        ("--workdir", "/task"),
        ("--env", "SEED=7"),
        ("--env", "wall_s=3"),
        ("--entrypoint", "bash"),
    }
    assert "--privileged" not in options
    assert not {"--volume", "-v", "--mount"} & {*options}
    assert argv[image + 1] == "-c"
    assert argv[-2:] == ["sandbox", b"ls"]


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    box = make_sandbox("podman:tools")
    with pytest.raises(StartError, match=r"podman not found: install it, or use .* bubblewrap"):
        asyncio.run(box.check_machine())
    with pytest.raises(RolloutError, match="podman does not start: No such file"):
        asyncio.run(box.run("true", b""))


def test_a_program_that_makes_no_container_is_told_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho Cannot connect to the Docker daemon >&2\nexit 125\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StartError, match=r"Cannot connect.*does `docker run tools bash` work"):
        asyncio.run(make_sandbox("docker:tools").check_machine())


def test_no_more_containers_run_at_once_than_there_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program is one that leaves a file until all that may run beside it have begun."""
    docker, most = tmp_path / "docker", 3
    monkeypatch.setattr("plugins.sandboxes.container.MOST_AT_ONCE", most)
    begun, made = tmp_path / "begun", 3 * most
    begun.mkdir()
    docker.write_text(f"""#!/bin/bash
[ "$1" = run ] || exit 0
cat >/dev/null &
: >{begun}/$$
for _ in {{1..100}}; do set -- {begun}/*; [ $# -ge {most} ] && break; sleep 0.05; done
sleep 0.3
set -- {begun}/*
echo $# >>{tmp_path}/counts
rm {begun}/$$
printf 'ready\\n'
""")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def test() -> None:
        await asyncio.gather(*(make_sandbox("docker:tools").run("ls", b"") for _ in range(made)))

    asyncio.run(test())
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == made
    assert max(counts) == most


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", "it would let an agent do what you may. Expected bubblewrap, docker:IMAGE"),
        ("subprocess", "it would let an agent do what you may"),
        ("docker", "expected bubblewrap, docker:IMAGE or podman:IMAGE"),
        ("docker:--privileged", "expected bubblewrap, docker:IMAGE"),
        ("podman:a b", "expected bubblewrap, docker:IMAGE"),
        ("lxc:tools", "expected bubblewrap, docker:IMAGE"),
    ],
)
def test_another_sandbox_is_refused(name: str, told: str) -> None:
    task = {"instruction": "go", "check": "true", "sandbox": name}
    with pytest.raises(ConfigError) as error:
        TerminalKind().check_task(task)
    assert told in str(error.value)
    assert repr(name) in str(error.value)


def test_bubblewrap_is_chosen_by_its_name() -> None:
    assert isinstance(make_sandbox("bubblewrap", SMALL), Bubblewrap)


def run(*commands: str, limits: Limits = SMALL, **variables: str) -> Ran:
    """The last of several commands, each with the files that the one before left."""

    async def one_after_the_other() -> Ran:
        files = b""
        for command in commands:
            ran = await make_sandbox(REAL, limits).run(command, files, variables)
            files = ran.files or files
        return ran

    return asyncio.run(one_after_the_other())


@needs_container
def test_files_stay_and_nothing_else_can_be_written() -> None:
    asyncio.run(make_sandbox(REAL, SMALL).check_machine())
    ran = run("mkdir d; echo $SEED > d/a; chmod 750 d/a", "cat d/a; stat -c %a d/a", SEED="7")
    assert (ran.exit_code, ran.output) == (0, b"7\n750\n")
    for place in ("/x", "/usr/x", "/etc/x"):
        assert run(f"echo x > {place}").exit_code == 1, place


@needs_container
def test_a_container_has_no_network_and_no_privileges() -> None:
    assert run("echo > /dev/tcp/127.0.0.1/80").exit_code == 1
    shown = run(
        "while read a b; do case $a in CapEff:|NoNewPrivs:) echo $b;; esac; done "
        "< /proc/self/status"
    ).output.split()
    assert shown == [b"0000000000000000", b"1"]
    assert run("while read a b; do echo $a; done < /proc/net/dev").output.split()[2:] == [b"lo:"]


@needs_container
def test_time_processes_memory_and_output_are_limited() -> None:
    assert run("echo hi > a; sleep 60").exit_code == 124
    bomb = "f() { f | f & }; f 2>/dev/null; sleep 1; echo still here > a"
    assert run(bomb, "cat a", limits=replace(SMALL, wall_s=30)).output == b"still here\n"
    assert run("head -c 2000000 /dev/zero > a").exit_code != 0
    ran = run("echo hi > a; yes")
    assert (len(ran.output), ran.cut) == (SMALL.output_bytes, True)


@needs_container
def test_a_cancelled_command_leaves_no_container() -> None:
    program = REAL.partition(":")[0]

    async def containers() -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(program, "ps", "--all", "--filter", "name=nextstate-", "--format", "{{.Names}}"),
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0]

    async def cancelled() -> None:
        box = make_sandbox(REAL, Limits(wall_s=60))
        task = asyncio.create_task(box.run("sleep 55", b""))
        while not await containers():
            await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await containers()

    asyncio.run(asyncio.wait_for(cancelled(), 60))
