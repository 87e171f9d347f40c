"""Strategies as a user may write them; test_strategy names them by this module's path."""

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg


def moved(arrays, change):
    return ArrayRecord({n: Array(np.asarray(change(a.numpy()))) for n, a in arrays.items()})


class Remembers(FedAvg):
    """FedAvg that adds a share of everything it remembers: every kind of memory counts."""

    def __init__(self, share=0.5, **kwargs):
        super().__init__(**kwargs)
        self.share = share
        self.rounds = 0
        self.scalar = np.float64(0.1)
        self.flag = False
        self.array = None
        self.by_name = {}
        self.in_order = []
        self.record = ArrayRecord()
        self.emptied = None
        self.nothing = 1
        self.number = 1
        self.grow = lambda a, push: a + np.float32(push)  # created for every object, and not memory

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert self.emptied is None or len(self.emptied) == 0
        now = {n: a.numpy() for n, a in arrays.items()}
        first = next(iter(now.values()))
        self.rounds += 1
        self.scalar = self.scalar / 3
        self.flag = not self.flag
        self.array = first * 0.25 + (0 if self.array is None else self.array)
        self.by_name = {n: a * self.scalar + self.by_name.get(n, 0) for n, a in now.items()}
        # against the order of names
        self.in_order = [a * 0.5 for a in reversed(now.values())]
        self.record = moved(arrays, lambda a: a * 0.75)
        self.emptied = {}
        self.nothing = None
        self.number = 1.0  # equal, but of another type
        total = sum(float(np.abs(a).sum()) for a in (self.array, *self.by_name.values()))
        total += float(self.in_order[0].flat[0]) + float(
            next(iter(self.record.values())).numpy().flat[0]
        )
        push = self.share * (total + self.rounds + self.flag) * 1e-3
        return moved(arrays, lambda a: self.grow(a, push)), metrics


class Rolls(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return moved(arrays, lambda a: a + np.random.normal(size=a.shape)), metrics


class Hides(FedAvg):
    """Memory where a copy of the object does not find it."""

    seen: list = []  # noqa: RUF012

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seen.append(server_round)
        return moved(arrays, lambda a: a * len(self.seen)), metrics


class Journal(FedAvg):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.journal = []

    def aggregate_train(self, server_round, replies):
        self.journal.append(f"round {server_round}")
        return super().aggregate_train(server_round, replies)


class Waits(FedAvg):
    def __init__(self, least=20):
        super().__init__(min_train_nodes=least, min_available_nodes=least)


class Sends(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        grid.send_and_receive(messages)
        return messages


class SendsOther(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        half = moved(arrays, lambda a: a / 2)
        return super().configure_train(server_round, half, config, grid)


class AsksHalf(FedAvg):
    def __init__(self):
        super().__init__(fraction_train=0.5)


class AsksOneTwice(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return [messages[0], *messages[:-1]]


class Renames(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({f"{n}.new": a for n, a in arrays.items()}), metrics


class Breaks(FedAvg):
    def aggregate_train(self, server_round, replies):
        if server_round > self.after:
            raise RuntimeError("boom")
        return super().aggregate_train(server_round, replies)

    def __init__(self, after=0, **kwargs):
        super().__init__(**kwargs)
        self.after = after


class Divides(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return moved(arrays, lambda a: a * np.float32("nan")), metrics


class OwnKeys(FedAvg):
    def __init__(self, **kwargs):
        super().__init__(arrayrecord_key="weights", weighted_by_key="rows", **kwargs)


class Replaces(FedAvg):
    """Takes the first reply's arrays: nothing of its base's aggregation is left."""

    def aggregate_train(self, server_round, replies):
        return next(iter(replies)).content["arrays"], None


class ReplacesBelow(Replaces):
    """Calls the aggregation of a base that replaces it."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)
