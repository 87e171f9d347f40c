"""Print the vectors of test_mixed_rank_vectors.py: plain numpy in float64, no code of silotune.

Two clients with weights 3 and 1 and ranks 2 and 1 on one module of 3 x 3, dense products only.

    python tests/unit/algorithms/mixed_rank_vectors.py
"""

import numpy as np

B1, A1 = np.array([[1, 0], [-2, 1], [0.5, 2]]), np.array([[1, -1, 0], [0, 2, 1.0]])
B2, A2 = np.array([[-1], [1], [3.0]]), np.array([[2, 0, -1.0]])
SHARES = (0.75, 0.25)


def padded(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rank 2, with zeros behind a lower rank."""
    left, right = np.zeros((3, 2)), np.zeros((2, 3))
    left[:, : b.shape[1]], right[: a.shape[0]] = b, a
    return left, right


def show(name: str, matrix: np.ndarray) -> None:
    """One line per matrix, row after row."""
    print(name, [round(float(x), 10) for x in matrix.ravel()])  # noqa: T201


if __name__ == "__main__":
    products = [B1 @ A1, B2 @ A2]
    mean = sum(p * m for p, m in zip(SHARES, products, strict=True))
    show("flora", mean)
    u, s, vh = np.linalg.svd(mean)
    for rank in (1, 2):
        show(f"flexlora {rank}", (u[:, :rank] * s[:rank]) @ vh[:rank])
    norms = [np.linalg.norm(m) for m in products]
    shares = [n / sum(norms) for n in norms]
    both = [padded(B1, A1), padded(B2, A2)]
    left = sum(p * b for p, (b, _) in zip(shares, both, strict=True))
    right = sum(p * a for p, (_, a) in zip(shares, both, strict=True))
    show("hetlora B", left)
    show("hetlora A", right)
    left, right = (sum(p * f[i] for p, f in zip(SHARES, both, strict=True)) for i in (0, 1))
    show("fedex mean", left @ right)
    show("fedex residual", mean - left @ right)
