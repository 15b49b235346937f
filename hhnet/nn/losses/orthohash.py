"""OrthoHash: softmax over the cosines to fixed binary centres, with a margin.

    - mean over samples of  sum_k t_k log softmax_k( s (cos(z, c_k) - m y_k) ),   t = y / sum(y)

s = sqrt(K) and m = 0.2 (the authors use 0.3 for CIFAR, found 0.4 best for ImageNet and 0.5 for COCO). Meant
for the head Linear without bias + batch normalisation, which balances the bits. Source: Hoe et al. 2021,
kamwoh/orthohash `main.py`, `loss/orthohash.py`, `docs/suppmat.pdf` C.1 and D.1.

Shape suffixes: B samples, K bits, C classes.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from hhnet.nn.losses.base import HashLoss, above, at_least, class_centres, soft_cross_entropy


class OrthoHash(HashLoss):
    """The OrthoHash loss; the module gives its equation.

    Options: `scale` s, None for sqrt(K); `margin` m; `seed` of the centres.
    """

    default_head: ClassVar[str] = "bn"
    soft_labels: ClassVar[bool] = True
    unit_centres: Tensor

    def __init__(
        self, bits: int, classes: int, *, scale: float | None = None, margin: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(bits, classes)
        self.scale, self.margin = math.sqrt(bits) if scale is None else scale, margin
        above(0, scale=self.scale)
        at_least(0, margin=margin)
        centres_CK = class_centres(classes, bits, seed, orthogonal=True).double() / math.sqrt(bits)
        self.register_buffer("unit_centres", centres_CK.float())

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        cos_BC = normalize(z_BK) @ self.unit_centres.to(z_BK.dtype).T
        return soft_cross_entropy(self.scale * (cos_BC - self.margin * labels_BC), labels_BC)
