"""Notification volume: who gets which message, within weekly caps per user and two budgets per campaign.

    python examples/notifications.py

Solves a small marketplace with string keys to a certified 1e-5, rounds it to whole messages, serves a user who was not
there, and re-plans in mid-week from warm prices.
"""

import numpy as np
import pyarrow as pa
from polytope_lp import Columns, Policy, box_cut, from_arrow, solve


def tables(users: int = 4000, campaigns: int = 25, seed: int = 0) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Edges (who may get what, what a click is worth, what it costs), campaigns with two budgets, caps by user."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 6)
    campaign = np.concatenate([random.permutation(campaigns)[:6] for _ in range(users)])
    value = random.lognormal(-3.0, 0.6, user.size)
    bid = random.lognormal(0.0, 0.4, user.size)
    edges = pa.table(
        {
            "user": [f"user-{i}" for i in user],
            "campaign": [f"campaign-{j}" for j in campaign],
            "value": value,
            "bid": bid,
            "message": np.ones(user.size),
        }
    )
    budgets = pa.table(
        {
            "campaign": [f"campaign-{j}" for j in range(campaigns)],
            "money": random.uniform(0.1, 0.4, campaigns) * np.bincount(campaign, bid, campaigns),
            "messages": np.floor(random.uniform(0.1, 0.5, campaigns) * np.bincount(campaign, minlength=campaigns)),
        }
    )
    caps = pa.table({"user": [f"user-{i}" for i in range(users)], "cap": random.integers(1, 4, users).astype(float)})
    return edges, budgets, caps


def main() -> None:
    """Plan, round, serve, re-plan."""
    edges, budgets, caps = tables()
    columns = Columns(
        source="user", destination="campaign", cost=("bid", "message"), budget=("money", "messages"), cap="cap"
    )
    problem = from_arrow(edges, budgets, box_cut(1.0, 1.0), columns, sources=caps)  # each message at most once per user
    plan = solve(problem, tol=1e-5)
    print(f"{plan.status}: value {-plan.objective:.4f}, at most {-plan.lower_bound:.4f}, gap {plan.gap:.1e}")
    print("verified:", plan.verify()["ok"])

    whole = plan.rounded()
    print(f"whole messages: {int(whole.x.sum())}, value {whole.value:.4f}, within {whole.gap:.2%} of the best")

    worth = plan.sensitivity().sort_by([("elasticity", "descending")]).slice(0, 3)
    for row in worth.to_pylist():
        print(f"one more unit of {row['resource']} of {row['destination']} is worth {row['price']:.4f}")

    policy = Policy.from_solution(plan)  # numpy only; save("policy.npz") and load it in the service
    candidates = policy.rows(["campaign-3", "campaign-11", "campaign-20"])
    x = policy.score([0.12, 0.05, 0.09], [[1.1, 1.0], [0.7, 1.0], [0.9, 1.0]], candidates, cap=2.0)
    print("a new user gets", dict(zip(("campaign-3", "campaign-11", "campaign-20"), x.round(3).tolist(), strict=True)))

    spent = plan.load.numpy() * np.random.default_rng(1).uniform(0.4, 0.6, plan.load.numel())
    states = plan.pacing(spent, elapsed=0.5)["state"].to_pylist()
    print("mid-week:", {state: states.count(state) for state in sorted(set(states))})
    rest = from_arrow(edges, left(budgets, spent), box_cut(1.0, 1.0), columns, sources=caps)
    warm, cold = solve(rest, tol=1e-3, warm_start=plan.lam), solve(rest, tol=1e-3)
    print(f"re-planned to 1e-3 in {warm.evaluations} evaluations from the old prices, {cold.evaluations} from nothing")


def left(budgets: pa.Table, spent: np.ndarray) -> pa.Table:
    """What the budgets have left."""
    money, messages = spent.reshape(2, -1)
    rest = {"money": budgets["money"].to_numpy() - money, "messages": budgets["messages"].to_numpy() - messages}
    return pa.table({"campaign": budgets["campaign"], **{name: np.maximum(v, 0.0) for name, v in rest.items()}})


if __name__ == "__main__":
    main()
