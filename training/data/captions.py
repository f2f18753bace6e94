"""Words for scenes: many phrasings of the same picture, and edit instructions between two pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .concepts import Concept
from .pictures import STYLE

LEADS = (
    "", "", "", "", "a picture of ", "an image of ", "an illustration of ", "a drawing of ", "an icon of ", "an emoji of ",
    "draw ", "show me ", "please draw ", "i want ", "i would like ", "make ", "create ", "generate ", "paint ", "just ",
    "a nice ", "a simple picture of ", "a small illustration of ", "artwork of ", "clipart of ", "a sticker of ", "a sketch of ",
    "there is ", "here is ", "this is ", "can you draw ", "give me ", "let me see ", "render ", "depict ", "a portrait of ",
)  # fmt: skip
ON = (
    "on {}",
    "on a {}",
    "against {}",
    "against a {}",
    "with {}",
    "with a {}",
    "in front of a {}",
    "over a {}",
    "set on {}",
    "placed on a {}",
)
COLOURED = (
    "background {}", "background: {}", "the background is {}", "{} in the background", "background color {}", "backdrop in {}", "where the back is {}",
    "surrounded by {}", "{} behind", "and {} as the background", "its background {}", "{} at the back", "colored {} in the back",
)  # fmt: skip
GROUND = ("background", "background", "background", "backdrop", "ground", "surface", "canvas", "backing", "")
STYLED = (
    "{} style",
    "in {} style",
    "in the {} style",
    "in the style of {}",
    "{} art",
    "drawn as {}",
    "as {} artwork",
    "{}",
    "the {} look",
    "rendered in {} style",
    "looking like {}",
    "{} version",
    "with a {} feel",
    "inspired by {}",
    "from the {} set",
    "style {}",
)
# what people write around a wish, and what a reader must learn to pass over
OPENERS = (
    "hi", "hello there", "hey", "ok so", "quick one", "next", "good morning", "my daughter asked for this", "for the school newsletter",
    "for a poster", "for grandma's birthday card", "i am decorating a room", "we are making a game", "for my blog", "as a logo", "if you can",
    "whenever you have time", "i keep dreaming of this", "in one picture", "task", "wanted", "new idea", "client request", "today's picture",
    "what i have in mind is", "it would be lovely to have", "is it possible to get", "do you think you could make", "try to come up with",
    "let us have", "how about", "surprise us with", "put together", "the teacher wants", "my brother likes", "everybody loves",
)  # fmt: skip
CLOSERS = (
    "thanks", "thank you so much", "thanks a lot", "if possible", "as soon as you can", "nothing else in it", "keep it simple", "make it pretty",
    "for a t-shirt", "for our shop", "that is all", "no text", "high quality", "very cute", "well drawn", "just like that", "you know what i mean",
    "it is for a friend", "we will print it", "as you like it", "with love", "nice and clean", "ok", "please and thank you", "cheers",
    "good enough for a sticker", "no people", "by tomorrow", "i will use it as an avatar", "that would make my day",
)  # fmt: skip
CHATTER = 0.15  # how often each of them is said
NUMBERS = {2: ("two", "2", "a pair of", "a couple of"), 3: ("three", "3"), 4: ("four", "4")}
PLACES = {
    "center": ("in the middle", "in the center", "centered", ""),
    "top left": ("in the top left", "in the upper left corner", "at the top left"),
    "top right": ("in the top right", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right", "in the lower right corner", "at the bottom right"),
    "left": ("on the left", "at the left side", "to the left"),
    "right": ("on the right", "at the right side", "to the right"),
    "top": ("at the top", "in the upper half", "near the top"),
    "bottom": ("at the bottom", "in the lower half", "near the bottom"),
    "small": ("", "very small"),
    "large": ("", "filling the picture"),
}
DESCRIBED = 0.8  # names other than the label are descriptions above this roll
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A background: one colour, two for a vertical gradient (top to bottom), or a named pattern."""

    top: str
    bottom: str
    pattern: str | None = None


def name_of(concept: Concept, rng: random.Random, plain: float = 0.55) -> str:
    """One way to say a concept: its label with probability `plain`, else another name or a description."""
    if rng.random() < plain:
        return concept.label
    roll = rng.random()
    if concept.described and roll > DESCRIBED:
        return rng.choice(concept.described)
    if concept.loose and roll < 0.12:
        return rng.choice(concept.loose)
    if concept.tags and roll < 0.24:
        return f"{concept.label} {rng.choice(concept.tags)}"
    return rng.choice(concept.names)


def with_article(name: str, rng: random.Random) -> str:
    """`owl` -> `an owl`, `the owl` or `owl`."""
    roll = rng.random()
    if roll < 0.35 or name.startswith(("a ", "an ", "the ")):
        return name
    if roll < 0.45:
        return f"the {name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """A rough English plural, good enough for captions."""
    if name.endswith("s"):
        return name
    return name + "es" if name.endswith(("x", "ch", "sh")) else name + "s"


def ground_words(ground: Ground, rng: random.Random) -> str:
    """`on a blue to pink gradient background`."""
    if ground.pattern is not None:
        words = f"{ground.pattern} {rng.choice(GROUND[:5])}"
    elif ground.top == ground.bottom:
        words = f"{rng.choice(('', '', '', 'plain ', 'solid '))}{ground.top} {rng.choice(GROUND)}"
    else:
        joint = rng.choice((" to ", " to ", " fading to ", " into "))
        words = f"{ground.top}{joint}{ground.bottom} {rng.choice(('gradient ', 'gradient ', ''))}{rng.choice(GROUND[:5])}"
    if rng.random() < 0.2:
        return rng.choice(COLOURED).format(said(ground))
    return rng.choice(ON).format(words.strip())


def said(ground: Ground) -> str:
    """The bare name of a background: `blue`, `blue to pink`, `night sky`."""
    if ground.pattern is not None:
        return ground.pattern
    return ground.top if ground.top == ground.bottom else f"{ground.top} to {ground.bottom}"


def style_words(style: str, rng: random.Random) -> str:
    """`in twemoji style`."""
    phrases = STYLE[style].phrases
    return rng.choice(STYLED).format(phrases[0] if rng.random() < 0.7 else rng.choice(phrases))


def assemble(things: str, style: str | None, ground: Ground | None, rng: random.Random) -> str:
    """Put subject, style and background into one of many sentence shapes; None leaves a part out."""
    lead, drawn = rng.choice(LEADS), style_words(style, rng) if style else ""
    behind = ground_words(ground, rng) if ground else ""
    shapes = (
        f"{drawn} {lead}{things} {behind}", f"{lead}{things} {drawn} {behind}", f"{lead}{things} {behind} {drawn}",
        f"{lead}{things}, {drawn}, {behind}", f"{drawn}, {things}, {behind}", f"{behind}, {things}, {drawn}", f"{drawn}: {things}, {behind}",
        f"{behind} {things} {drawn}", f"{lead}{things}, {behind}, {drawn}", f"{drawn} {things} {behind}",
        f"{things}. {drawn}. {behind}.", f"{lead}{things} ({drawn}), {behind}", f"{drawn}; {behind}; {things}", f"{things} / {drawn} / {behind}",
        f"{behind}, {drawn}: {things}", f"{things} and {behind}, {drawn}", f"{lead}{drawn} {things} that is {behind}",
    )  # fmt: skip
    words = chatty(rng.choice(shapes), rng)
    for wrong, right in ((" ,", ","), (" .", "."), (" ;", ";"), ("()", ""), (",,", ","), ("..", ".")):
        words = " ".join(words.replace(wrong, right).split())
    return words.strip(" ,:;/")


def chatty(words: str, rng: random.Random) -> str:
    """Now and then with an opening or a closing remark."""
    before = rng.choice(OPENERS) + rng.choice((", ", ": ", " ", " - ")) if rng.random() < CHATTER else ""
    after = rng.choice((", ", ". ", " ", "; ")) + rng.choice(CLOSERS) if rng.random() < CHATTER else ""
    return f"{before}{words}{after}"


def single(name: str, place: str, rng: random.Random) -> str:
    """One object with its place or size."""
    if place in SIZE_WORDS:
        return f"{with_article(f'{rng.choice(SIZE_WORDS[place])} {name}', rng)} {rng.choice(PLACES[place])}".strip()
    return f"{with_article(name, rng)} {rng.choice(PLACES[place])}".strip()


def pair(first: str, second: str, upright: bool, rng: random.Random) -> str:
    """Two objects: `first` left of (or above) `second`, said from either side."""
    a, b = with_article(first, rng), with_article(second, rng)
    if upright:
        return rng.choice(
            (
                f"{a} above {b}",
                f"{b} below {a}",
                f"{a} on top of {b}",
                f"{a} over {b}",
                f"{b} under {a}",
                f"{a} at the top and {b} at the bottom",
            )
        )
    return rng.choice((
        f"{a} and {b}", f"{a} and {b}", f"{a} left of {b}", f"{a} to the left of {b}", f"{b} right of {a}", f"{b} to the right of {a}",
        f"{a} next to {b}", f"{a} beside {b}", f"{a} on the left and {b} on the right", f"{b} on the right and {a} on the left", f"{a} with {b}",
        f"left {first}, right {second}", f"{a}, {b}", f"{a} together with {b}",
    ))  # fmt: skip


def triple(names: list[str], rng: random.Random) -> str:
    """Three objects from left to right."""
    a, b, c = (with_article(name, rng) for name in names)
    return rng.choice(
        (
            f"{a}, {b} and {c}",
            f"{a} and {b} and {c}",
            f"{a} next to {b} next to {c}",
            f"from left to right {a}, {b}, {c}",
            f"{a}, {b}, {c} in a row",
        )
    )


def counted(name: str, number: int, rng: random.Random) -> str:
    """Several of the same object."""
    word = rng.choice(NUMBERS[number])
    return rng.choice(
        (f"{word} {plural(name)}", f"{word} {plural(name)}", f"{word} copies of {with_article(name, rng)}")
    )


EDIT_STYLE = (
    "change the style to {}", "make it {}", "turn this into {}", "redraw it {}", "convert the picture to {}", "use {}", "the same picture {}",
    "restyle the picture as {}", "now {}", "change it to {}",
)  # fmt: skip
EDIT_GROUND = (
    "change the background to {}", "make the background {}", "replace the background with {}", "{} background instead", "put it on {}",
    "set the background to {}", "turn the background {}", "recolor the background to {}", "now on a {} background", "use a {} background",
)  # fmt: skip
EDIT_SWAP = (
    "replace the {a} with {b}",
    "turn the {a} into {b}",
    "swap the {a} for {b}",
    "change the {a} to {b}",
    "put {b} in place of the {a}",
    "{b} instead of the {a}",
)
EDIT_ADD = (
    "add {b} {where}",
    "put {b} {where}",
    "place {b} {where}",
    "draw {b} {where}",
    "also add {b} {where}",
    "insert {b} {where}",
)
EDIT_REMOVE = (
    "remove the {b}",
    "delete the {b}",
    "take away the {b}",
    "erase the {b}",
    "get rid of the {b}",
    "without the {b}",
    "take the {b} out",
)
EDIT_KEEP = (
    "keep the picture as it is",
    "change nothing",
    "the same picture",
    "leave it unchanged",
    "copy the picture",
)


def ground_edit(ground: Ground, rng: random.Random) -> str:
    """Instruction that names the new background."""
    gradient = "" if ground.pattern or ground.top == ground.bottom else " gradient"
    return rng.choice(EDIT_GROUND).format(f"{said(ground)}{gradient}")
