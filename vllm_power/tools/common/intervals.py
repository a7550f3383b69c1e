"""Confidence intervals of shares."""

import math


def wilson(successes: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, 95% by default. Scores between 0 and 1 count as parts of a success."""
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - spread), min(1.0, centre + spread)
