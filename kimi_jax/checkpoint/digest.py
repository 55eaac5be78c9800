"""128-bit digests (xxh3) of arrays and of plain data: against damage and mix-ups, not against malice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xxhash


def of_array(data: np.ndarray) -> str:
    """Of the bytes, in C order."""
    return xxhash.xxh3_128(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).hexdigest()


def of_json(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
