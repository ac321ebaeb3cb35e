"""Shared set-up: one thread per test process, so that parallel processes do not fight for cores."""

import torch

torch.set_num_threads(1)
