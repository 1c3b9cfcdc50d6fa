"""JSON files with values that their readers do not expect."""

import json


def value(rng, depth=0):
    """A value that a config does not expect."""
    makers = (
        lambda: rng.choice((0, -1, 1, 3, 7, 10**6, 2**20, 2**31, 2**63, 10**12, 10**30, -(2**40))),
        lambda: rng.choice((0.0, -1.5, 1e300, float("nan"), float("inf"), 1e-300)),
        lambda: rng.choice(("", "x", "\0", "../..", "ü" * 300, "hf-hub:a/b", "a/b", "[", "None")),
        lambda: rng.choice((None, True, False, [], {}, [[]], [None], {"": ""})),
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(3))] if depth < 3 else None,
        lambda: {f"k{i}": value(rng, depth + 1) for i in range(rng.randrange(3))},
    )
    return rng.choice(makers if depth < 3 else makers[:4])()


def places(content):
    """The dicts and lists of a JSON value with each of their keys."""
    keyed, containers = [], [content]
    for container in containers:
        for key in container if isinstance(container, dict) else range(len(container)):
            keyed.append((container, key))
            if isinstance(container[key], (dict, list)):
                containers.append(container[key])
    return keyed


def change_json(path, rng, extra=()):
    """Replace values of a JSON file, remove some, add some, or replace all of it."""
    content = json.loads(path.read_text())
    if rng.random() < 0.05:
        content = value(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not isinstance(content, (dict, list)) or not places(content):
            break
        owner, key = rng.choice(places(content))
        if isinstance(owner, dict) and rng.random() < 0.2:
            del owner[key]
        elif isinstance(owner, dict) and extra and rng.random() < 0.2:
            owner[rng.choice(extra)] = value(rng)
        else:
            owner[key] = value(rng)
    path.write_text(json.dumps(content))
