r"""Ghost mode: exact mSAM without touching the weights, at 5/3 of a plain step whatever the number of micro-batches.

For a linear layer, a micro-batch's ascent direction has low rank, $\epsilon_j = c_j G_j^\top A_j$ with its inputs A_j
(r x d_in) and output gradients G_j (r x d_out). So

- pass 1 runs forward, and backward to activations only; $\|g_j\|^2 = \sum_{layers} \sum (A_j A_j^\top + 1) \circ
  (G_j G_j^\top)$, the +1 for the bias;
- pass 2 runs one forward with the shared weights plus $(x_j A_j^\top + 1)(c_j G_j)$, and one backward.

That is 2 + 3 of the 3 matrix products of a plain step. Where $\kappa = r (d_{in} + d_{out}) / (d_{in} d_{out})$ reaches
1/3, the perturbation is materialised instead (a factor of 2).

Isolation by construction: the loss function runs once for all micro-batches under `torch.func.vmap`, so it sees one
micro-batch, and nothing it does can reach another one. A `Tape` sees every torch function. Products, embeddings and
convolutions have rules that compute them for all micro-batches at once with shared weights; to any other function a
parameter comes as m replicas, one for each micro-batch. What cannot run so raises `UnsupportedError`: a number read
out of a tensor that micro-batches do not agree on, a write to the model's buffers, a parameter that reaches the loss
without the tape.
"""

from msam.engines.ghost.engine import Ghost
from msam.engines.ghost.errors import DisagreeError, UnsupportedError

__all__ = ["DisagreeError", "Ghost", "UnsupportedError"]
