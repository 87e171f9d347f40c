"""The arms that have a role of their own, by name, and which arm each is compared with."""

from silotune.recipes.schema import RunConfig

BASE = "base"
"""The untrained arm."""
LOCAL = "local"
"""The arm that the others are compared with: not having joined."""
RESULT = "federated"
"""The recipe's own arm. The names of other federated arms start with it, too."""
OWN_STEPS = "own steps"
INTERPOLATION = "interpolation"
EXTENDED = (LOCAL, RESULT)
"""The arms that [finish] extends, at every client: whoever joins may do nothing after the last
round that the lone client may not do, too."""


def extension(arm: str, what: str) -> str:
    """The name of an arm that goes on from another one."""
    return f"{arm} + {what}"


_BUILDS_ON = {
    **{extension(arm, OWN_STEPS): arm for arm in EXTENDED},
    **{extension(arm, INTERPOLATION): extension(arm, OWN_STEPS) for arm in EXTENDED},
}


def builds_on(arm: str) -> str | None:
    """The arm that this one goes on from, whose cost is part of its own; None for most."""
    return _BUILDS_ON.get(arm)


def extensions(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Arm -> what it extends, and how: the arms that [finish] adds to a comparison."""
    own = run.finish
    ways = [OWN_STEPS] * bool(own.local_steps) + [INTERPOLATION] * bool(own.interpolate)
    return {extension(arm, way): (arm, way) for arm in EXTENDED for way in ways}


def counterpart(arm: str) -> str:
    """The arm of lone clients that had as many examples and trials: what an arm is compared with.

    >>> counterpart("federated + own steps"), counterpart("federated: fedprox")
    ('local + own steps', 'local')
    """
    if builds_on(arm) is None or arm.startswith(LOCAL):
        return LOCAL
    return LOCAL + arm.removeprefix(RESULT)
