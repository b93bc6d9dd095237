"""Has Python programs that find this folder on their path compute without oneDNN."""

import torch

torch.backends.mkldnn.set_flags(False)
