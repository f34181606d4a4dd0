r"""Ghost mode: exact mSAM without touching the weights, at 5/3 of a plain step whatever the number of micro-batches.

For a linear layer, a micro-batch's ascent direction has low rank, $\epsilon_j = c_j G_j^\top A_j$ with its inputs A_j
(r x d_in) and output gradients G_j (r x d_out). So

- pass 1 runs forward, and backward to activations only; $\|g_j\|^2 = \sum_{layers} \sum (A_j A_j^\top + 1) \circ
  (G_j G_j^\top)$, the +1 for the bias;
- pass 2 runs one whole-batch forward with the shared weights plus $(x_j A_j^\top + 1)(c_j G_j)$, and one backward.

That is 2 + 3 of the 3 matrix products of a plain step. Where $\kappa = r (d_{in} + d_{out}) / (d_{in} d_{out})$ reaches
1/3, the perturbation is materialised instead (a factor of 2).

A `Tape` sees every torch function that takes a perturbed parameter, so no use of one can be missed by wrapping modules;
what it has no rule for raises `UnsupportedError`. Before the first step of a model, `proof` measures along which
dimension each use lays out the examples, and that the gradients put together from the recorded factors are the true
ones of every micro-batch.
"""

from msam.engines.ghost.engine import Ghost
from msam.engines.ghost.errors import UnsupportedError

__all__ = ["Ghost", "UnsupportedError"]
