"""Images in memory, or from a data set or a loader, in batches at an encoder's size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frechet_gan.choices import Resize
from frechet_gan.images.arrays import KEYS, check_range, in_range, stack, to_image, to_images
from frechet_gan.images.arrays import resize as resize_tensor
from frechet_gan.images.resizing import resized


def memory_batches(
    images: Any,
    name: str = "images",
    batch: int = 64,
    size: int | None = None,
    *,
    resize: Resize = "native",
    value_range: tuple[float, float] | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Batches of images.

    Args:
        images: A tensor (n, c, h, w), an array (n, h, w, c), a list or data set of what `arrays.to_image` recognizes,
            or an iterable of such images or of batches of them (alone, first in a tuple, or in a dictionary).
        name: The argument's name, for messages.
        batch: Images per batch.
        size: Height and width to resize to, in pixels; without it all images must have one size.
        resize: How, as for files; floats stay floats with `native`, and go through pixels otherwise.
        value_range: Smallest and largest value of floats; [-1, 1] if None.
        chosen: Indices of the images to take; all if None.

    Yields:
        Images, shape (batch or fewer, c, h, w), in [-1, 1], float32.

    Raises:
        TypeError: If they are nothing of the kind.
        ValueError: If shapes differ, or floats lie outside the range.
    """
    for i, part in enumerate(_parts(images, name, batch, chosen)):
        if i and value_range is None:
            value_range = (-1.0, 1.0)  # the first batch has shown that it is this one; a later one may be all bright
        items = [part] if not isinstance(part, list) else [to_image(item, name) for item in part]
        if isinstance(part, list):
            if size is None or len({(i.shape, i.dtype) for i in items}) == 1:
                items = [stack(items, name)]
            else:  # of several sizes: the range of floats shows in all of them together
                ends = [torch.stack(i.aminmax()) for i in items if i.is_floating_point()]
                if ends:
                    ranges = in_range(name, torch.stack(ends), value_range)
                    check_range(name, ranges, claimed=value_range is not None)
                items = [i[None] for i in items]
        ready = [_at_size(to_images(i, name, value_range), size, resize, i.dtype in _BYTES) for i in items]
        yield ready[0] if len(ready) == 1 else stack([i[0] for i in ready], name)


_BYTES = (torch.uint8, np.dtype(np.uint8))


def _parts(images: Any, name: str, batch: int, chosen: Sequence[int] | None) -> Iterator[Any]:
    """Tensors and arrays of four dimensions, or lists of single images."""
    if isinstance(images, np.ndarray) and images.dtype == object:
        images = list(images)
    if isinstance(images, (Tensor, np.ndarray)):
        if images.ndim != 4:
            raise ValueError(
                f"{name}: expected four dimensions (n, c, h, w) or (n, h, w, c), got shape {tuple(images.shape)}"
            )
        rows = images if chosen is None else images[list(chosen)]
        yield from (rows[i : i + batch] for i in range(0, len(rows), batch))
    elif isinstance(images, Mapping) or (not isinstance(images, Iterable) and not hasattr(images, "__getitem__")):
        raise TypeError(f"{name}: expected a tensor, an array or a sequence of images, got {type(images).__name__}")
    elif hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        order = range(len(images)) if chosen is None else list(chosen)
        yield from ([images[i] for i in order[k : k + batch]] for k in range(0, len(order), batch))
    elif chosen is not None:
        raise ValueError(f"num: expected None, because {name} does not say how many images it has")
    else:
        waiting: list[Any] = []
        for item in images:
            content = _content(item)
            if isinstance(content, (Tensor, np.ndarray)) and content.ndim == 4:
                yield content
            else:
                waiting.append(item)
            if len(waiting) == batch:
                yield waiting
                waiting = []
        if waiting:
            yield waiting


def _content(item: Any) -> Any:
    """What a loader's tuple or dictionary holds of images."""
    if isinstance(item, Mapping):
        return next((item[k] for k in KEYS if k in item), None)
    return item[0] if isinstance(item, (tuple, list)) and item else item


def _at_size(images: Tensor, size: int | None, mode: Resize, bytes_: bool) -> Tensor:
    """Images in [-1, 1] at another size, by way of pixels where files would be: `bytes_` says they were some."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    if mode == "native" and not bytes_:
        return resize_tensor(images, size)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([resized(p, size, mode).float() for p in pixels]) / 127.5 - 1
