"""Spectra of symmetric operators known only by their products: Hessians, top eigenvalues, traces.

Symbols: A a symmetric operator of size d, theta a Ritz value with unit Ritz vector v, ||A v - theta v|| its residual.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core_tensor.checks import check_number, check_tensor


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric d x d matrix, known by its product with a vector.

    Attributes:
        product: `v (size,) -> A v (size,)`; it must be linear and symmetric, which nothing here verifies.
        size: Dimension d.
        dtype: Floating dtype of the vectors.
        device: Device of the vectors.
    """

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            vector: Vector, shape (size,).

        Returns:
            A v, shape (size,).
        """
        return self.product(vector)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector for this operator, drawn on the CPU so that devices and ranks agree.

        Args:
            generator: CPU generator; torch's default one if absent.

        Returns:
            Vector, shape (size,).
        """
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)


@dataclass(frozen=True)
class Eigenpairs:
    """The algebraically largest eigenvalues found, with what is known about their quality.

    Attributes:
        values: Ritz values, largest first, float64 on the CPU, shape (k,). Each is within its residual of an
            eigenvalue; that it is the largest one rests on the start vector not being orthogonal to it.
        vectors: Unit Ritz vectors in the columns, shape (d, k).
        residuals: ||A v - theta v||, float64 on the CPU, shape (k,).
        products: How many products with A were spent.
        converged: Whether every residual passed the tolerance before the steps ran out.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


@dataclass(frozen=True)
class TraceEstimate:
    """An unbiased estimate of a trace.

    Attributes:
        value: The estimate.
        standard_error: Its estimated standard deviation; NaN from a single probe.
        products: How many products with A were spent.
    """

    value: float
    standard_error: float
    products: int


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors into one vector.

    Args:
        tensors: Tensors of one dtype and device.

    Returns:
        Vector, shape (total number of elements,).
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def check_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Refuse parameters that have no real, flat vector form.

    Args:
        parameters: The parameters a Hessian is taken over.

    Returns:
        The parameters, as a list.

    Raises:
        TypeError: If one is not a real floating tensor, or dtypes differ.
        ValueError: If there is none, one does not require a gradient, or devices differ.
    """
    listed = list(parameters)
    if not listed:
        raise ValueError("parameters: expected at least one parameter, got none")
    for parameter in listed:
        check_tensor("parameters", parameter)
        if not parameter.is_floating_point():
            raise TypeError(f"parameters: expected real floating tensors, got {parameter.dtype}")
        if not parameter.requires_grad:
            raise ValueError("parameters: expected tensors that require a gradient, got one that does not")
    if len({p.dtype for p in listed}) > 1:
        raise TypeError(f"parameters: expected one dtype, got {sorted({str(p.dtype) for p in listed})}")
    if len({p.device for p in listed}) > 1:
        raise ValueError(f"parameters: expected one device, got {sorted({str(p.device) for p in listed})}")
    return listed


def hessian_operator(
    closure: Callable[[], Tensor], parameters: Iterable[Tensor], *, keep_graph: bool = True
) -> SymmetricOperator:
    r"""The Hessian of a loss, by double backward: `A v = d/dw <dL/dw, v>`.

    The loss must be twice differentiable by autograd (fused attention kernels are not: select torch's math backend
    around the closure).

    Args:
        closure: Evaluates the loss, a real scalar; must give the same value at every call (no dropout).
        parameters: Parameters w; d is their total number of elements.
        keep_graph: Keep the gradient's graph between products: faster, and holds the activations in memory until the
            operator is dropped. Otherwise every product evaluates the closure again, at the parameters of that moment.

    Returns:
        The Hessian, acting on flat vectors in the order of `parameters`.

    Raises:
        TypeError: If the parameters are not real floating tensors of one dtype, or the closure's value is no tensor.
        ValueError: If there are no parameters, or the loss is not a finite scalar.
    """
    listed = check_parameters(parameters)

    def gradient() -> Tensor:
        with torch.enable_grad():
            loss = closure()
            check_tensor("closure", loss, shape=())
            check_tensor("closure", loss.detach(), finite=True)
            if not loss.requires_grad:
                raise ValueError("closure: expected a loss that depends on the parameters, got a constant")
            return flatten(torch.autograd.grad(loss, listed, create_graph=True, materialize_grads=True))

    kept = gradient() if keep_graph else None

    def product(vector: Tensor) -> Tensor:
        first = gradient() if kept is None else kept
        if not first.requires_grad:  # a loss linear in w
            return torch.zeros_like(vector)
        second = torch.autograd.grad(
            first, listed, grad_outputs=vector, retain_graph=kept is not None, materialize_grads=True
        )
        return flatten(second).detach()

    return SymmetricOperator(product, sum(p.numel() for p in listed), listed[0].dtype, listed[0].device)


def lanczos(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    max_vectors: int | None = None,
    basis_dtype: torch.dtype | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""The k algebraically largest eigenvalues by Lanczos with full reorthogonalisation and a residual stop.

    Stops as soon as all k Ritz pairs satisfy `||A v - theta v|| <= tolerance |theta|` (with ARPACK's floor for tiny
    |theta|). At an invariant subspace it continues from a fresh random direction until one more such direction changes
    nothing, so the identity and k above the rank come out right; a repeated eigenvalue that passes the tolerance
    before that counts once. For the smallest eigenvalues pass the negated operator.

    Once `max_vectors` are held, the upper Ritz vectors replace the basis and the recurrence continues from
    them (thick restart): more products in less memory. A `basis_dtype` below the operator's halves the memory again;
    its rounding enters the residuals, which it keeps above a few tenths of a percent for bfloat16.

    Args:
        operator: The operator A.
        k: How many eigenvalues, 1 to d.
        tolerance: Relative residual to stop at.
        max_steps: Most products to spend.
        max_vectors: Most vectors of size d held as a basis, at least k + 2; `max_steps` if absent, that is no restart.
        basis_dtype: Floating dtype that the basis is stored in; the operator's if absent.
        start: Start vector, such as an earlier eigenvector, shape (d,). It must have a component along what is sought.
        generator: Source of the random start and of fresh directions.

    Returns:
        The pairs, their residuals, and whether they converged.

    Raises:
        ValueError: If an argument is out of range, the start is zero, or a product is not finite.
        TypeError: If an argument has the wrong type.

    Source:
        Golub & Van Loan, Matrix Computations, sec. 10.1-10.3; stopping rule of ARPACK's dsconv; restart of Wu & Simon,
        SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    check_number("k", k, low=1, high=operator.size, integer=True)
    check_number("tolerance", tolerance, low=0)
    check_number("max_steps", max_steps, low=k, integer=True)
    if max_vectors is not None:
        check_number("max_vectors", max_vectors, low=k + 2, integer=True)
    if basis_dtype is not None and not basis_dtype.is_floating_point:
        raise TypeError(f"basis_dtype: expected a floating dtype, got {basis_dtype}")
    if start is not None:
        check_tensor("start", start, shape=(operator.size,), finite=True)
        if not bool(start.any()):
            raise ValueError("start: expected a vector that is not zero")
        start = start.to(operator.device, operator.dtype)
    vector = operator.random(generator) if start is None else start
    capacity = min(max_steps if max_vectors is None else max_vectors, operator.size)
    basis = _Basis(operator, capacity, basis_dtype or operator.dtype)
    projected = _Projected()
    eps = torch.finfo(operator.dtype).eps
    floor = eps ** (2 / 3)
    vector = vector / vector.norm()
    settled: Tensor | None = None  # the values at the last invariant subspace
    products = 0
    while True:
        # 1. one more direction
        projected.round(basis.append(vector))
        vector = basis.newest()
        image = operator(vector)
        products += 1
        check_tensor("operator", image, shape=(operator.size,), finite=True)
        along = float(torch.dot(vector, image))
        image = basis.reject(image)
        projected.append(along, float(image.norm()))
        # 2. Ritz pairs, and whether they will do
        theta, rotation = projected.eigh()  # largest first
        size = float(theta.abs().max())
        if projected.off[-1] <= 10 * eps * size or size == 0.0:
            projected.off[-1] = 0.0  # invariant subspace: all Ritz pairs are exact
        count = min(k, len(theta))
        values, residuals = theta[:count], projected.residuals(rotation[:, :count])
        passed = bool((residuals <= tolerance * values.abs().clamp_min(floor * size)).all())
        beside = projected.off[-1]
        if beside == 0.0:
            passed, settled = settled is not None and _same(values, settled, floor * size), values
        complete = len(theta) == operator.size
        if products >= max_steps or complete or (passed and count == k):
            break
        # 3. thick restart
        if len(theta) == capacity:
            keep = min(k + (capacity - k) // 2, capacity - 1)
            projected.restart(theta[:keep], rotation[:, :keep], basis.rotate(rotation[:, :keep]))
        vector = image / beside if beside > 0 else basis.fresh(generator)
    converged = (passed or complete) and count == k
    return Eigenpairs(values, basis.combine(rotation[:, :count]), residuals, products, converged)


def hutchinson_trace(
    operator: SymmetricOperator, probes: int = 50, *, generator: torch.Generator | None = None
) -> TraceEstimate:
    """Hutchinson's unbiased trace estimate: the mean of z'Az over random sign vectors z.

    Args:
        operator: The operator A.
        probes: Number of sign vectors; one product each.
        generator: CPU generator of the signs.

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: If `probes` is not positive or a product is not finite.

    Source:
        Hutchinson 1990; variance 2 (||A||_F^2 - sum_i A_ii^2) per probe.
    """
    check_number("probes", probes, low=1, integer=True)
    samples = torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        z = signs(operator, generator)
        samples[i] = torch.dot(z, operator(z))
    if not bool(samples.isfinite().all()):
        raise ValueError("operator: expected finite products, got NaN or infinite ones")
    error = float(samples.std()) / math.sqrt(probes) if probes > 1 else math.nan
    return TraceEstimate(float(samples.mean()), error, probes)


def signs(operator: SymmetricOperator, generator: torch.Generator | None = None) -> Tensor:
    """A vector of independent random signs, drawn on the CPU so that devices and ranks agree.

    Args:
        operator: The operator whose size, dtype and device the vector takes.
        generator: CPU generator.

    Returns:
        Vector of -1 and 1, shape (size,).
    """
    bits = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def _same(values: Tensor, earlier: Tensor, slack: float) -> bool:
    return len(values) == len(earlier) and bool((values - earlier).abs().max() <= slack)


class _Projected:
    """V'AV in the basis V: tridiagonal, after a restart with an arrow of kept Ritz values at its head.

    Rounding of a stored basis vector by e leaves A V - V (V'AV) a defect in the column it was computed from; defects
    are taken as orthogonal to one another, as rounding errors in many dimensions nearly are.
    """

    def __init__(self) -> None:
        self.diagonal: list[float] = []
        self.off: list[float] = []  # off[j] joins j and j + 1; zero in the head
        self.coupling = torch.zeros(0, dtype=torch.float64)  # of the head with the first vector after it
        self.defects: list[float] = []

    def append(self, diagonal: float, off: float) -> None:
        self.diagonal.append(diagonal)
        self.off.append(off)
        self.defects.append(0.0)

    def round(self, error: float) -> None:
        """Account for the rounding of the vector that is about to be appended."""
        head = len(self.coupling)
        if error and len(self.diagonal) == head:
            pairs = zip(self.defects, self.coupling.tolist(), strict=True)
            self.defects = [math.hypot(defect, coupling * error) for defect, coupling in pairs]
        elif error:
            self.defects[-1] = math.hypot(self.defects[-1], self.off[-1] * error)

    def eigh(self) -> tuple[Tensor, Tensor]:
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        if len(self.diagonal) > 1:
            beside = torch.tensor(self.off[:-1], dtype=torch.float64)
            matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
        head = len(self.coupling)
        if head:
            matrix[head, :head] = matrix[:head, head] = self.coupling
        theta, rotation = torch.linalg.eigh(matrix)
        return theta.flip(0), rotation.flip(1)

    def residuals(self, rotation: Tensor) -> Tensor:
        found: Tensor = self.off[-1] * rotation[-1].abs()
        if not any(self.defects):
            return found
        rounding = torch.tensor(self.defects, dtype=torch.float64)[:, None] * rotation
        return (found.square() + rounding.square().sum(0)).sqrt()

    def restart(self, theta: Tensor, rotation: Tensor, errors: Tensor) -> None:
        """Keep some Ritz pairs, whose vectors were rounded by `errors` when stored."""
        defects = torch.tensor(self.defects, dtype=torch.float64)[:, None] * rotation
        # A e is small beside theta e: rounding errors have hardly anything along the few large eigenvectors
        self.defects = (defects.square().sum(0) + (theta * errors).square()).sqrt().tolist()
        self.coupling = self.off[-1] * rotation[-1]
        self.diagonal, self.off = theta.tolist(), [0.0] * len(theta)


class _Basis:
    """Orthonormal rows that grow without being copied at every step, stored in their own dtype."""

    _COLUMNS = 2**18
    """Columns converted at a time where the storage has another dtype."""

    def __init__(self, operator: SymmetricOperator, capacity: int, dtype: torch.dtype) -> None:
        self._operator, self._capacity = operator, capacity
        self._exact = dtype == operator.dtype
        self._buffer = torch.empty((min(8, capacity), operator.size), dtype=dtype, device=operator.device)
        self._scales = torch.ones(capacity, dtype=operator.dtype, device=operator.device)  # rounded rows to unit norm
        self._count = 0

    @property
    def rows(self) -> Tensor:
        return self._buffer[: self._count]

    def newest(self) -> Tensor:
        row = self.rows[-1]
        return row if self._exact else row.to(self._operator.dtype) * self._scales[self._count - 1]

    def append(self, vector: Tensor) -> float:
        """Store a vector; returns the norm of its rounding."""
        if self._count == len(self._buffer):
            larger = self._buffer.new_empty((min(2 * self._count, self._capacity), self._operator.size))
            larger[: self._count] = self._buffer
            self._buffer = larger
        self._buffer[self._count] = vector
        self._count += 1
        if self._exact:
            return 0.0
        self._scales[self._count - 1] = 1 / self.rows[-1].to(self._operator.dtype).norm()
        return float((self.newest() - vector).norm())

    def reject(self, vector: Tensor) -> Tensor:
        if self._exact:
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                vector = torch.addmv(vector, self.rows.T, self.rows @ vector, alpha=-1)
            return vector
        vector = vector.clone()
        for _ in range(2):
            along = torch.stack([piece @ vector[where] for where, piece in self._pieces()]).sum(0)
            for where, piece in self._pieces():
                vector[where] -= along @ piece
        return vector

    def fresh(self, generator: torch.Generator | None) -> Tensor:
        vector = self.reject(self._operator.random(generator))
        vector = self.reject(vector / vector.norm())
        vector /= vector.norm()
        return vector

    def rotate(self, rotation: Tensor) -> Tensor:
        """Replace the rows by `rotation' rows`, in place; returns the norms of their rounding."""
        weights = rotation.T.to(self._operator.device, self._operator.dtype)
        count = len(weights)
        errors, squares = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for where, piece in self._pieces():
            rotated = weights @ piece
            self._buffer[:count, where] = rotated.to(self._buffer.dtype)
            if not self._exact:
                stored = self._buffer[:count, where].to(rotated)
                errors += (stored - rotated).square().sum(1).double().cpu()
                squares += stored.square().sum(1).double().cpu()
        if not self._exact:
            self._scales[:count] = squares.rsqrt().to(self._scales)
        self._count = count
        return errors.sqrt()

    def combine(self, rotation: Tensor) -> Tensor:
        """Unit vectors `rows' rotation` in the columns, in the operator's dtype."""
        weights = rotation.to(self._operator.device, self._operator.dtype)
        if self._exact:
            return self.rows.T @ weights
        combined = torch.empty(self._operator.size, weights.shape[1], dtype=weights.dtype, device=weights.device)
        for where, piece in self._pieces():
            combined[where] = piece.T @ weights
        return combined.div_(combined.norm(dim=0))

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows, some columns at a time, in the operator's dtype."""
        for first in range(0, self._operator.size, self._COLUMNS):
            where = slice(first, first + self._COLUMNS)
            piece = self.rows[:, where]
            yield where, piece if self._exact else piece.to(self._operator.dtype) * self._scales[: self._count, None]
