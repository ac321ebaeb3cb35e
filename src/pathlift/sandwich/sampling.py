from dataclasses import dataclass
@dataclass(frozen=True)
class Estimate:
    value: float
def estimated(*a): raise NotImplementedError
