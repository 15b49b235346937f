"""Where no GPU is, Triton's interpreter runs the kernels of the GPU, so that each test runs anywhere.

It must be asked for before Triton is imported: these tests have a process of their own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
