"""Give back the memory of checkpoint pages that were read and are not needed any more.

safetensors maps files into memory, and pages once read count as resident until the file is closed, which transformers
does when everything is loaded: without this, a process that loads in 4 bits holds the whole bf16 checkpoint at the end.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Sequence

import torch


def release_file_pages(tensors: Iterable[torch.Tensor], files: Sequence[str]) -> None:
    """Tell the kernel to drop the pages of `tensors` that are views of mapped `files`. Read again, they come back.

    Only whole pages inside a tensor go, so its neighbours keep theirs. Other tensors, and systems other than Linux, are
    left alone.

    Args:
        tensors (`Iterable[torch.Tensor]`): what is not needed any more.
        files (`Sequence[str]`): paths of a checkpoint. A tensor in any other memory, mapped or not, may hold what no
            file does.
    """
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_contiguous()]
    if not sys.platform.startswith("linux") or not tensors or not files:
        return
    mappings = _mappings(files)
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(low <= start and end <= high for low, high in mappings):
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED))


def _mappings(files: Sequence[str]) -> list[tuple[int, int]]:
    """Address ranges of this process at which `files` are mapped."""
    endings = tuple(f" {os.path.realpath(file)}\n" for file in files)
    with open("/proc/self/maps") as lines:
        ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(endings)]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]
