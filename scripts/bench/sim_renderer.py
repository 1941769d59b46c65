"""Frames per CPU-second of the software renderer, by size and cameras: one JSON line each."""

import json
import sys
import time

from zk0bot.sim.arm import HOME, Arm
from zk0bot.sim.renderer import Renderer
from zk0bot.sim.tasks import TASKS

SECONDS = 1.0


def main() -> None:
    arm = Arm(TASKS[0].rgb)
    arm.reset(HOME, (0.25, 0.08), 0.3)
    for size in (64, 96, 256, 480):
        renderer = Renderer(arm.model, size)
        for cameras in (("front",), ("front", "wrist")):
            done, began = 0, time.process_time()
            while time.process_time() - began < SECONDS:
                for camera in cameras:
                    renderer.render(arm.data, camera)
                done += 1
            rate = round(done / (time.process_time() - began))
            line = {"size": size, "cameras": len(cameras), "per_cpu_s": rate}
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
