r"""Logs of a marketplace whose truth is known, with one knob per component of the paper.

A user u sees an item i at time t in a context c (device and surface) at a position p. The logit of the first label is

$$ z = b + k_{ids} (\alpha_u + \beta_i + v_u^\top v_i) + k_{crosses} \Big( \sum_{a<b} \langle e_a, e_b \rangle +
e_{hour} e_{category} e_{device} \Big) + k_{history} \, \bar v_u(t)^\top v_i + k_{drift} \, d_i(t) + x^\top \theta , $$

with $\bar v_u(t)$ the mean vector of the last items that u clicked, $d_i$ a slow wave with its own phase, x the
numbers. The label is 1 with probability $(1 + p)^{-k_{position}} \, m_c(\sigma(z))$, where $m_c$ is a monotone map of
each context, the identity at $k_{calibration} = 0$. Further tasks share a part of z. Each probability is returned
beside the log: its AUC is the best that any model can reach, and with all knobs at 0 nothing but numbers matters.
"""

import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pyarrow as pa
from core_tensor.checks import check_number

from lirank.schema.features import Dense, History, Id, Label, Popularity, Schema, Time

DEVICES = ("android", "ios", "web")
SURFACES = ("recommendation", "search")
CATEGORIES, HOURS, POSITIONS = 40, 24, 10
_WIDTH = 8
_SCALE = 1 / math.sqrt(_WIDTH)
_REMEMBERED = 8
"""Clicked items that make a user's present taste."""
_DAY = 86_400
_START = 1_750_000_000


@dataclass(frozen=True)
class Task:
    """A further label.

    Attributes:
        name: Its name.
        rate: Its mean.
        shared: Correlation of its logit with that of the first label.
    """

    name: str
    rate: float
    shared: float = 0.6


@dataclass(frozen=True)
class Market:
    """What is generated.

    Attributes:
        users: Users.
        items: Items.
        events: Impressions.
        days: Length of the log.
        label: Name of the first label.
        rate: About its mean, before the position bias.
        tasks: Further labels.
        ids: What depends on who and what: users, items, and their match.
        crosses: Interactions of hour, category, device and surface, of second and third order.
        history: How far the last clicks of a user say what comes next.
        drift: How far items rise and fall over the log.
        calibration: How far the probabilities of a context are bent, monotonically.
        position: How fast attention falls with the position.
        dwell: How far dwell times differ between contexts.
        cold: Share of users and items that appear during the log.
        negatives: Share of the rows without the first label that are kept.
        seed: Seed of everything.
    """

    users: int = 2000
    items: int = 1000
    events: int = 100_000
    days: float = 30.0
    label: str = "click"
    rate: float = 0.2
    tasks: tuple[Task, ...] = ()
    ids: float = 1.0
    crosses: float = 0.0
    history: float = 0.0
    drift: float = 0.0
    calibration: float = 0.0
    position: float = 0.0
    dwell: float = 0.0
    cold: float = 0.0
    negatives: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be generated."""
        for name in ("users", "items", "events"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("ids", "crosses", "history", "drift", "calibration", "position", "dwell"):
            check_number(name, getattr(self, name), low=0)
        check_number("rate", self.rate, low=0, high=1, open_low=True, open_high=True)
        check_number("cold", self.cold, low=0, high=1, open_high=True)
        check_number("negatives", self.negatives, low=0, high=1, open_low=True)


@dataclass(frozen=True)
class Generated:
    """A log and its truth.

    Attributes:
        log: Rows in order of time.
        truth: Probability of every label in every row, as columns of the labels' names.
        schema: A schema of the log: all ids, numbers, history and popularity.
        market: What was generated.
    """

    log: pa.Table
    truth: pa.Table
    schema: Schema
    market: Market


@dataclass
class _Drawn:
    """The columns of the log while it is made; one entry per event."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    category: np.ndarray
    device: np.ndarray
    surface: np.ndarray
    hour: np.ndarray
    position: np.ndarray
    numbers: np.ndarray
    vectors: np.ndarray = field(repr=False)


FEED = Market(
    rate=0.25,
    tasks=(Task("like", 0.08), Task("comment", 0.03), Task("share", 0.02)),
    ids=0.8,
    crosses=0.5,
    history=1.0,
    dwell=0.8,
    position=0.3,
)
"""A feed: click, like, comment, share and dwell times; tastes that move."""

JOBS = Market(
    label="apply", rate=0.12, tasks=(Task("qualified", 0.05, 0.8),), ids=0.8, crosses=0.7, history=0.7, cold=0.3
)
"""Search and recommendation of jobs: applications, and qualified ones; new jobs all the time."""

ADS = Market(rate=0.03, ids=0.8, crosses=0.7, calibration=0.8, position=0.5, drift=0.5, negatives=0.2)
"""Ads: rare chargeable clicks, whose probability is what is paid for; sampled negatives, drift."""

PRESETS = {"feed": FEED, "jobs": JOBS, "ads": ADS, "market": Market(crosses=0.5, history=0.8)}


def generate(market: Market) -> Generated:
    """Generate a log.

    Args:
        market: What is generated; the same gives the same.

    Returns:
        The log, its truth, and a schema.
    """
    generator = np.random.default_rng(market.seed)
    events = _draw(market, generator)
    fixed = _fixed_logit(market, events, generator)
    fixed += _intercept(fixed, market.rate)
    logit, label = _play(market, events, fixed, generator)
    probability = _shown(market, events, logit)
    columns = {
        "time": events.time,
        "user": events.user,
        "item": events.item,
        "category": events.category,
        "device": pa.array(events.device.astype(np.int32)),
        "surface": pa.array(events.surface.astype(np.int32)),
        "hour": events.hour,
        "position": events.position,
        "price": np.exp(events.numbers[:, 0]),
        "age": events.numbers[:, 1],
        "quality": events.numbers[:, 2],
        market.label: label.astype(np.int8),
    }
    columns["device"] = pa.DictionaryArray.from_arrays(columns["device"], list(DEVICES))
    columns["surface"] = pa.DictionaryArray.from_arrays(columns["surface"], list(SURFACES))
    truth = {market.label: probability}
    standard = (logit - logit.mean()) / max(float(logit.std()), 1e-12)
    for task in market.tasks:
        chance = _task_probability(task, events, standard, generator)
        truth[task.name] = chance
        columns[task.name] = (generator.random(len(chance)) < chance).astype(np.int8)
    if market.dwell:
        columns["dwell"] = _dwell(market, events, standard, generator)
    log, known = pa.table(columns), pa.table(truth)
    if market.negatives < 1:
        kept = (label > 0) | (generator.random(len(label)) < market.negatives)
        log, known = log.filter(pa.array(kept)), known.filter(pa.array(kept))
    return Generated(log, known, schema_of(market), market)


def schema_of(market: Market, *, history: bool | None = None) -> Schema:
    """A schema of a market's log.

    Args:
        market: The market.
        history: Whether it has the user's history; None where the market's labels depend on it.

    Returns:
        All ids, numbers, popularity, and history and position where the market has them.
    """
    if history is None:
        history = market.history > 0
    ids = [Id(name=name, rows=1 << 14) for name in ("user", "item", "category")]
    ids += [Id(name=name, type="string", vocabulary="static", rows=16) for name in ("device", "surface")]
    ids += [Id(name="hour", vocabulary="static", rows=64)]
    numbers = [Dense(name="price", transform="log1p"), Dense(name="age"), Dense(name="quality")]
    counts = [
        Popularity(name=f"{key}_rate", key=(key,), label=market.label, prior=market.rate) for key in ("user", "item")
    ]
    remembered = [History(name="history", key="user", item="item", action=market.label)] if history else []
    return Schema(
        features=(*ids, *numbers, *counts, *remembered),
        labels=(Label(name=market.label), *(Label(name=task.name) for task in market.tasks)),
        time=Time(column="time"),
        group="user",
        position="position" if market.position else "",
        sampling=market.negatives,
    )


def without(schema: Schema, *kinds: type, names: tuple[str, ...] = ()) -> Schema:
    """A schema without some of its features: the other side of an ablation.

    Args:
        schema: The schema.
        kinds: Kinds of features to leave out.
        names: Names of features to leave out.

    Returns:
        The smaller schema.
    """
    kept = tuple(f for f in schema.features if not isinstance(f, kinds) and f.name not in names)
    return msgspec.structs.replace(schema, features=kept)


# ----------------------------------------------------------------------------------------------------------------------


def _draw(market: Market, generator: np.random.Generator) -> _Drawn:
    """Who sees what, when and where; nothing of it depends on the labels."""
    n = market.events
    time = np.sort(generator.random(n))  # of the whole log
    user = _who(market.users, market.cold, time, 0.6, generator)
    item = _who(market.items, market.cold, time, 0.8, generator)
    category_of = generator.integers(CATEGORIES, size=market.items)
    device_of = generator.choice(len(DEVICES), size=market.users, p=(0.5, 0.3, 0.2))
    seconds = (time * market.days * _DAY).astype(np.int64)
    # items of one category have like vectors
    centers = generator.normal(size=(CATEGORIES, _WIDTH))
    vectors = 0.7 * centers[category_of] + 0.7 * generator.normal(size=(market.items, _WIDTH))
    return _Drawn(
        user=user,
        item=item,
        time=_START + seconds,
        category=category_of[item],
        device=device_of[user],
        surface=generator.integers(len(SURFACES), size=n),
        hour=seconds % _DAY // 3600,
        position=generator.integers(POSITIONS, size=n),
        numbers=generator.normal(size=(n, 3)),
        vectors=vectors,
    )


def _who(count: int, cold: float, time: np.ndarray, exponent: float, generator: np.random.Generator) -> np.ndarray:
    """One of `count` per event, by Zipf's law among those that are there already."""
    weight = (np.arange(count) + 1.0) ** -exponent
    order = generator.permutation(count)
    born = np.where(generator.random(count) < cold, generator.random(count), 0.0)
    cumulative = np.cumsum(weight) / weight.sum()
    found: np.ndarray = order[
        np.searchsorted(cumulative, generator.random(len(time)), side="right").clip(max=count - 1)
    ]
    for _ in range(50):  # draw again what has not been born
        early = np.flatnonzero(born[found] > time)
        if not len(early):
            return found
        drawn = np.searchsorted(cumulative, generator.random(len(early)), side="right").clip(max=count - 1)
        found[early] = order[drawn]
    found[born[found] > time] = int(np.argmin(born))  # nobody else is there yet
    return found


def _fixed_logit(market: Market, events: _Drawn, generator: np.random.Generator) -> np.ndarray:
    """The part of the logit that does not depend on earlier labels."""
    logit: np.ndarray = events.numbers @ np.array([0.5, -0.4, 0.6])
    tastes = generator.normal(size=(market.users, _WIDTH))
    user, item = generator.normal(size=market.users), generator.normal(size=market.items)
    match = (tastes[events.user] * events.vectors[events.item]).sum(1) * _SCALE
    logit = logit + market.ids * (0.6 * user[events.user] + 0.6 * item[events.item] + 0.7 * match)
    parts = [
        generator.normal(size=(size, _WIDTH))[column]
        for size, column in (
            (HOURS, events.hour),
            (CATEGORIES, events.category),
            (len(DEVICES), events.device),
            (len(SURFACES), events.surface),
        )
    ]
    pairs = sum((a * b).sum(1) for i, a in enumerate(parts) for b in parts[:i])
    third = (parts[0] * parts[1] * parts[2]).sum(1)
    logit = logit + market.crosses * _SCALE * (0.5 * pairs + third)
    phase = generator.random(market.items)[events.item]
    progress = (events.time - _START) / (market.days * _DAY)
    logit += market.drift * 1.5 * np.sin(2 * math.pi * (progress * 0.75 + phase))
    return logit


def _intercept(logit: np.ndarray, rate: float) -> float:
    """What to add so that the mean probability is the rate."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(_sigmoid(logit + middle).mean()) < rate else (low, middle)
    return (low + high) / 2


def _play(
    market: Market, events: _Drawn, fixed: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and first labels, the n-th events of all users at once, since a label moves its user's taste."""
    logit, label = fixed.copy(), np.zeros(len(fixed), dtype=np.int64)
    chance = generator.random(len(fixed))
    recent = np.zeros((market.users, _REMEMBERED, _WIDTH))
    clicks = np.zeros(market.users, dtype=np.int64)
    order = np.argsort(events.user, kind="stable")  # by user, within a user by time
    starts = np.searchsorted(events.user[order], np.arange(market.users))
    nth = np.empty(len(order), dtype=np.int64)
    nth[order] = np.arange(len(order)) - starts[events.user[order]]
    by_round = np.argsort(nth, kind="stable")
    for rows in np.split(by_round, np.cumsum(np.bincount(nth))[:-1]):
        user, vector = events.user[rows], events.vectors[events.item[rows]]
        if market.history:
            known = np.minimum(clicks[user], _REMEMBERED)
            taste = recent[user].sum(1) / np.maximum(known, 1)[:, None]
            logit[rows] += market.history * _SCALE * 1.5 * (taste * vector).sum(1)
        part = _Drawn(
            **{name: value[rows] for name, value in vars(events).items() if name != "vectors"}, vectors=vector
        )
        label[rows] = chance[rows] < _shown(market, part, logit[rows])
        clicked = label[rows] > 0
        recent[user[clicked], clicks[user[clicked]] % _REMEMBERED] = vector[clicked]
        clicks[user[clicked]] += 1
    return logit, label


def _shown(market: Market, events: _Drawn, logit: np.ndarray) -> np.ndarray:
    """Probability of the first label: bent by the context, and less attention further down."""
    context = events.device * len(SURFACES) + events.surface
    steepness = np.exp(market.calibration * np.linspace(-0.7, 0.7, len(DEVICES) * len(SURFACES)))[context]
    shift = market.calibration * np.linspace(-1.0, 1.0, len(DEVICES) * len(SURFACES))[::-1][context]
    # a kink, so that neither a scale nor a shift of the logit undoes the map
    bent = steepness * logit + shift + market.calibration * 0.8 * np.maximum(logit + 1.0, 0.0)
    probability: np.ndarray = _sigmoid(bent) * (1.0 + events.position) ** -market.position
    return probability


def _task_probability(task: Task, events: _Drawn, standard: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Probability of a further label: a part of the first one's logit, and its own effects of category and device."""
    own = generator.normal(size=CATEGORIES)[events.category] + generator.normal(size=len(DEVICES))[events.device]
    own = (own - own.mean()) / max(float(own.std()), 1e-12)
    logit = 1.3 * (task.shared * standard + math.sqrt(1 - task.shared**2) * own)
    return _sigmoid(logit + _intercept(logit, task.rate))


def _dwell(market: Market, events: _Drawn, standard: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Seconds spent: longer for what is liked, on a scale of each category and device."""
    scale = market.dwell * (
        generator.normal(size=CATEGORIES)[events.category] + generator.normal(size=len(DEVICES))[events.device]
    )
    seconds: np.ndarray = np.exp(2.0 + scale + 0.5 * standard + 0.5 * generator.normal(size=len(standard)))
    return seconds


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Without overflow."""
    value: np.ndarray = 0.5 * (1 + np.tanh(0.5 * x))
    return value
