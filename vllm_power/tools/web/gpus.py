"""The GPUs of the planner: their data sheets, and how much of these a kernel reaches.

What is reached was measured on an H200 (docs/kernels-notes.md, "The two limits"). Another GPU is expected to reach the
same share of its data sheet, until somebody measures it.
"""

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = Path(__file__).with_name("gpus.json")


class Gpu(BaseModel):
    """One GPU.

    sheet_tflops: bf16 matrix products without sparsity, TFLOP/s. sheet_tb_per_s: memory bandwidth. measured_*: what a
    large matrix product and a copy reached, where that is known. source: where the data sheet is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_gib: float
    sheet_tflops: float
    sheet_tb_per_s: float
    measured_tflops: float | None = None
    measured_tb_per_s: float | None = None
    source: str

    @property
    def tflops(self) -> float:
        """What a matrix product reaches, in TFLOP/s."""
        return self.measured_tflops or self.sheet_tflops * _share("tflops")

    @property
    def tb_per_s(self) -> float:
        """What a kernel that streams reaches, in TB/s."""
        return self.measured_tb_per_s or self.sheet_tb_per_s * _share("tb_per_s")


@cache
def known() -> dict[str, Gpu]:
    """The GPUs of gpus.json by name."""
    return {name: Gpu(**fields) for name, fields in json.loads(FILE.read_text()).items()}


def _share(unit: str) -> float:
    measured = known()["H200 SXM"]
    share: float = getattr(measured, f"measured_{unit}") / getattr(measured, f"sheet_{unit}")
    return share
