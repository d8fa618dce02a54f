"""Checksums of tensors, which safetensors files have in their metadata: against damage."""

import zlib

import torch

# In a file's metadata: CRC-32 of each tensor's bytes.
CHECKSUMS = "flexq.crc32"


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
