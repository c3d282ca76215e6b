"""Generated texts for a small language model, two tasks to fine-tune it on, and a tokenizer of their words.

The base reads plain texts about people, things and places: lists that are told twice, words in the order of a
dictionary, facts that come back. The tasks ask what those texts never do: ``lists`` sorts, turns, shortens and counts
a list step by step; ``table`` follows the friends in a table and reads off what the last one keeps. Everything follows
from a seed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Text = Callable[[random.Random], str]
Problem = tuple[str, str]


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


NAMES = words(
    "Ada Ben Cleo Dan Ella Finn Gwen Hugo Iris Jack Kira Leo Mona Nils Olga Paul Rosa Seth Tess Uma Viktor Wes "
    "Yara Zack"
)
PLACES = words(
    "attic barn cabin castle cellar chapel farm forge garage harbor hostel hotel kiosk lodge mill museum office "
    "palace school studio tavern temple tower villa"
)
COLORS = words("amber black blue brown golden green grey orange pink purple red silver white yellow")
VESSELS = words("bag barrel basket bowl box bucket case chest crate drawer jar sack trunk tub")
THINGS = words(
    "acorn anchor apple apricot arrow axe badge ball banana banjo bean beet bell belt bench bike blanket boat "
    "bone book boot bottle bracelet brick broom brush button cable cake camera candle cap card carrot chain chair "
    "cheese cherry chisel clock coat coin comb compass cork cup curtain cushion daisy date desk dice dish doll "
    "door drum eraser fan feather fiddle fig file flag flute fork frame funnel garlic gem glass glove grape "
    "guitar hammer harp hat helmet hinge hook horn iron jacket jug kettle key kite knife ladder lamp leek lemon "
    "lens lily lime lock lute magnet map marble mask match melon mirror mitten mug nail napkin needle net nut oar "
    "olive onion oven paddle paint pan paper parcel peach pear pearl pebble pen pepper piano pillow pipe plate "
    "plum pot puzzle quill quilt radio rake razor ribbon ring robe rope ruler saddle sail saw scarf scissors "
    "screw shell shoe shovel skate sled soap sock spade spoon stamp stone string sugar sword table tape teapot "
    "tent thimble tile timber toy tray tripod trumpet tulip turnip umbrella vase vest violin wagon walnut watch "
    "wheel whistle wire wrench yarn yoke zipper"
)

VOCABULARY = 4096


def listed(items: list[str]) -> str:
    """Return items as a list in a sentence, such as ``fig, pear and plum``."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def told_twice(rng: random.Random) -> str:
    """Return a list of things that is told, and told again in the same order."""
    name, color, vessel = rng.choice(NAMES), rng.choice(COLORS), rng.choice(VESSELS)
    things = rng.sample(THINGS, rng.randint(3, 7))
    return (
        f"{name} has a {color} {vessel}. In the {vessel} of {name} lie: {listed(things)}. "
        f"{rng.choice(NAMES)} looks into the {color} {vessel} and finds: {listed(things)}."
    )


def dictionary(rng: random.Random) -> str:
    """Return a page of a dictionary: words in order."""
    return f"A page of the dictionary: {', '.join(sorted(rng.sample(THINGS, rng.randint(5, 12))))}."


def homes(rng: random.Random) -> str:
    """Return who lives where and keeps what, and the same seen from the place."""
    people = rng.sample(NAMES, rng.randint(3, 5))
    facts = list(zip(people, rng.sample(PLACES, len(people)), rng.sample(THINGS, len(people)), strict=True))
    told = [f"{name} lives in the {place} and keeps a {thing} there." for name, place, thing in facts]
    rng.shuffle(facts)
    asked = [f"Who lives in the {place}? {name} does. The {thing} is in the {place}." for name, place, thing in facts]
    return " ".join(told + asked[: rng.randint(1, 3)])


def letters(rng: random.Random) -> str:
    """Return a chain of people who write to each other, and what each of them has, in rows."""
    people = rng.sample(NAMES, rng.randint(3, 6))
    chain = [f"{one} writes to {other}." for one, other in pairwise(people)]
    rows = [
        f"{name}: {thing}, {rng.randint(0, 99)}" for name, thing in zip(people, rng.sample(THINGS, 6), strict=False)
    ]
    return "\n".join([f"{' '.join(chain)} So the letter goes from {people[0]} to {people[-1]}.", *rows])


def numbered(rng: random.Random) -> str:
    """Return numbered things."""
    things = rng.sample(THINGS, rng.randint(3, 8))
    return f"Numbers: {', '.join(f'{number} {thing}' for number, thing in enumerate(things, rng.randint(1, 90)))}."


def plain_text(rng: random.Random) -> str:
    """Return a text of the kind that the base reads."""
    kinds: tuple[Text, ...] = (told_twice, dictionary, homes, letters, numbered)
    return "\n".join(kind(rng) for kind in rng.choices(kinds, weights=(4, 2, 3, 2, 1), k=rng.randint(1, 3)))


def lists_problem(rng: random.Random) -> Problem:
    """Return a list, one to three things to do with it, and the list after each of them with its last length."""
    items = rng.sample(THINGS, rng.randint(4, 7))
    question = f"List: {', '.join(items)}."
    answer = ""
    for number in range(rng.randint(1, 3)):
        step = rng.choice(("sort", "turn", "drop", "add"))
        if step == "sort":
            told, done, items = "sort it", "sorted", sorted(items)
        elif step == "turn":
            told, done, items = "turn it around", "turned", items[::-1]
        elif step == "drop":
            gone = rng.choice(items)
            told, done, items = f"drop {gone}", "left", [word for word in items if word != gone]
        else:
            new = rng.choice([thing for thing in THINGS if thing not in items])
            told, done, items = f"add {new}", "longer", [*items, new]
        question += f" {'Then' if number else 'First'} {told}."
        answer += f" {done}: {', '.join(items)}."
    return f"{question}\nAnswer:", f"{answer} #### {len(items)}"


def table_problem(rng: random.Random) -> Problem:
    """Return a table of people, things, places and friends, a question over some friends, and the way to its end."""
    people = rng.sample(NAMES, rng.randint(4, 6))
    things, places = rng.sample(THINGS, len(people)), rng.sample(PLACES, len(people))
    friends = [rng.choice([other for other in range(len(people)) if other != one]) for one in range(len(people))]
    rows = [f"{people[i]} | {things[i]} | {places[i]} | {people[friends[i]]}" for i in range(len(people))]
    at = rng.randrange(len(people))
    way = [people[at]]
    of_whom = people[at]
    if rng.random() < 0.3:
        way.insert(0, things[at])
        of_whom = f"the owner of {things[at]}"
    for _ in range(rng.randint(1, 3)):
        at = friends[at]
        way.append(people[at])
        of_whom = f"the friend of {of_whom}"
    told, found = rng.choice((("What is kept by", things[at]), ("What is the home of", places[at])))
    question = f"Table:\n{chr(10).join(rows)}\n{told} {of_whom}?\nAnswer:"
    return question, f" {', '.join(way)}. #### {found}"


TASKS: dict[str, Callable[[random.Random], Problem]] = {"lists": lists_problem, "table": table_problem}


@functools.cache
def word_tokenizer(texts: int = 4000) -> Any:
    """Return a tokenizer whose tokens are the words of these texts: byte pairs, merged until every word is one token.

    Args:
        texts: how many texts and problems of each kind it learns from.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    read = [plain_text(rng) for _ in range(texts)]
    for problem in TASKS.values():
        read += ["".join(problem(rng)) for _ in range(texts)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read, trainer)
    return tokenizer
