"""One of two ranks that exchange what trainings do, and a pickle; as a program under torchrun, told its folder."""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from embed_pipeline.launch.rank import meet, take_place
from embed_pipeline.training.process import arrays_from_all, from_all, from_main, wait_for_all


class Evil:
    """What unpickles it touches `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    place = take_place(2)
    meet(place, timedelta(minutes=2))
    mine = {"rank": place.rank, "not a number": math.nan, "exact": 0.1 + place.rank, "numpy": np.float32(0.5)}
    arrays = [np.full((2, 3), number + place.rank / 3, dtype=np.float32) for number in range(3 * place.rank)]
    told = {"from_main": from_main(mine), "from_all": from_all(mine)}
    gathered = arrays_from_all(arrays)
    told["arrays"] = [len(of_one) for of_one in gathered]
    told["same bits"] = all(map(np.array_equal, gathered[place.rank], arrays))
    try:
        torch.distributed.all_gather_object([None, None], Evil(folder / "code-ran"))
        told["refused"] = None
    except RuntimeError as error:
        told["refused"] = str(error)
    (folder / f"rank-{place.rank}.json").write_text(json.dumps(told))
    wait_for_all()
