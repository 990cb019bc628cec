"""What `nextstate up --ray` costs on one machine, beside `nextstate up`, before a scripted engine.

    python -m benchmarks.ray_loop

Prints seconds until ready, seconds until a killed part is back, memory and CPU time of Ray's own
processes while nothing happens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.app.test_ray_up import Up, actor_of, engine_running, write_config

IDLE_S = 30.0


def own_processes(up: Up) -> list[psutil.Process]:
    """Ray's, without the command and the parts."""
    parts = set(up.parts().values())
    found = psutil.Process(up.process.pid).children(recursive=True)
    ours = {one for part in parts for one in (part, *part.children(recursive=True))}
    return [one for one in found if one not in ours]


def megabytes(processes: list[psutil.Process]) -> float:
    """Their memory; what several share counts once."""
    total = 0
    for one in processes:
        with suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total / 1e6


def cpu_s(processes: list[psutil.Process]) -> float:
    total = 0.0
    for one in processes:
        with suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def ready_s(folder: Path, engine: int, *, ray: bool) -> tuple[Up, float]:
    folder.mkdir()
    began = time.monotonic()
    up = Up(write_config(folder, engine), ray=ray)
    up.wait_ready()
    return up, time.monotonic() - began


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="ray-loop-"))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    try:
        with engine_running() as engine:
            for number in range(3):
                up, alone = ready_s(folder / f"up-{number}", engine, ray=False)
                up.end()
                up, on_ray = ready_s(folder / f"ray-{number}", engine, ray=True)
                up.until(lambda up=up: len(up.parts()) == 3)
                print(f"ready after {alone:.1f} s, with --ray {on_ray:.1f} s", flush=True)
                took: list[float] = []
                for kills_actor in (False, True):
                    part = up.parts()["proxy"]
                    victim = actor_of(part) if kills_actor else part
                    assert victim is not None
                    began = time.monotonic()
                    up.back("proxy", victim)
                    up.until(up.answers)
                    took.append(time.monotonic() - began)
                print(f"answers again: part killed {took[0]:.1f} s, actor {took[1]:.1f} s")
                if number == 2:
                    own = own_processes(up)
                    names = sorted({one.name() for one in own})
                    print(f"memory of {len(own)} processes {megabytes(own):.0f} MB: {names}")
                    actors = [one for one in own if one.name().startswith("ray::Part")]
                    print(f"of which {len(actors)} actors {megabytes(actors):.0f} MB")
                    rest = [one for one in own if one not in actors]
                    for what, some in (("Ray", rest), ("actors", actors)):
                        before, began = cpu_s(some), time.monotonic()
                        time.sleep(IDLE_S)
                        share = (cpu_s(some) - before) / (time.monotonic() - began)
                        print(f"idle, {what}: {100 * share:.1f} % of a core")
                    driver = [psutil.Process(up.process.pid)]
                    print(f"the command: {megabytes(driver):.0f} MB")
                up.end()
        print(f"load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
