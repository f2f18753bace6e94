"""Whole sentences, as people talk, around what captions say briefly: for the text tower to read through.

No clause here is one that `benchmarks.base` judges unseen phrasings by.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import captions
from .captions import Ground
from .concepts import Concept
from .pictures import STYLE

WISHES = (
    "would you draw {a}", "please make me a picture with {a} in it", "i was hoping for {a}", "what about {a}", "could we get {a}",
    "let's try {a} this time", "the boss asked for {a}", "my sister adores {a}, so that is what i want", "it should show {a}",
    "the subject is {a}", "subject: {a}", "{a}, that is the idea", "all i need is {a}", "we are looking for {a}", "think of {a}",
    "{a} would be perfect here", "there must be {a}", "put {a} in the centre of attention", "the main thing is {a}", "main object {a}",
    "an avatar that shows {a}", "a badge with {a}", "a postcard of {a}", "sketch out {a} for the header", "prepare {a} for the slides",
    "the assignment: {a}", "object = {a}", "prompt: {a}", "i'm thinking of {a}", "try your hand at {a}", "produce {a}", "we see {a}", "one can see {a}",
    "here you find {a}", "look, {a}", "picture this: {a}", "a scene that contains {a}", "a sign with {a}", "a card featuring {a}",
    "in need of {a}", "hoping to receive {a}", "my son would be happy about {a}", "a photo-like view of {a}", "nothing but {a}", "only {a}",
    "a lonely {bare}", "exactly one {bare}", "this {bare}", "that {bare} again", "some kind of {bare}", "another {bare}", "your best {bare}",
    "a cute little {bare}", "the typical {bare}", "a {bare} like everybody knows it", "{bare}, as an icon", "{bare} icon", "{bare} symbol", "{bare} pictogram",
    "how would {a} turn out", "is {a} something you can do", "can it be {a}", "why not {a}", "{a} is what the team voted for", "{a} for the menu",
    "it's all about {a}", "story about {a}", "chapter one: {a}", "today we draw {a}", "next on the list is {a}", "number seven: {a}", "please, {a}",
    "somebody wants {a}", "the customer ordered {a}", "don't forget {a}", "let there be {a}", "behold {a}", "featuring {a}", "starring {a}",
)  # fmt: skip
MANNERS = (
    "following {s}", "as known from {s}", "with the looks of {s}", "like {s} does it", "similar to {s}", "taking {s} as a model", "in the spirit of {s}",
    "modelled on {s}", "based on {s}", "according to {s}", "{s} fashion", "à la {s}", "after {s}", "borrowing from {s}", "style: {s}", "look: {s}", "artist: {s}",
    "set: {s}", "choose {s}", "i prefer {s}", "{s} if you ask me", "{s} is my favourite", "make sure it is {s}", "it has to be {s}", "that's {s} all over",
    "as if it came from {s}", "taken from {s}", "the {s} way", "{s} flavour", "{s} type", "{s} design", "{s} drawing", "{s} graphics", "{s} emoji",
    "a {s} piece", "a typical {s} work", "painted by {s}", "made by {s}", "as {s} draws things", "the sort of thing {s} has", "so it fits our {s} icons",
    "matching {s}", "to go with the other {s} pictures", "consistent with {s}", "i like {s} best", "{s} aesthetics", "strictly {s}", "{s} only",
    "using {s}", "apply {s}", "go for {s}", "think {s}", "{s} vibes", "{s}-like", "style should be {s}", "the style being {s}", "for the style take {s}",
    "in {s}", "{s}", "by {s}", "from {s}", "with {s}", "[{s}]", "#{s}", "- {s} -", "\"{s}\"", "and it is {s}", "whose style is {s}", "drawn the {s} style",
)  # fmt: skip
BEHINDS = (
    "the background painted {c}", "background colour: {c}", "bg {c}", "bg: {c}", "color of the back {c}", "on top of {c}", "upon {c}", "everything else is {c}",
    "everything else {c}", "otherwise {c}", "the remaining area {c}", "the space around it is {c}", "around it {c}", "{c} everywhere else", "{c} backdrop please",
    "let the background be {c}", "background should be {c}", "i want the background {c}", "the surroundings are {c}", "surroundings {c}", "in a {c} setting",
    "in front of {c}", "standing before {c}", "placed over {c}", "{c} paper", "on {c} paper", "printed on {c}", "on a sheet of {c}", "a {c} scene", "{c} scenery",
    "with {c} as its backdrop", "with a lot of {c} around", "with {c} around it", "lots of {c}", "use {c} for the back", "take {c} for the background",
    "what you see behind is {c}", "what lies behind is {c}", "the wall is {c}", "the canvas is {c}", "canvas {c}", "{c} canvas", "a plain {c} field",
    "floating in {c}", "sitting in {c}", "against something {c}", "with a touch of nothing but {c} behind", "on a {c} card", "on our {c} page", "on the {c} site",
    "{c} at the rear", "behind it just {c}", "behind the subject {c}", "its backdrop being {c}", "and {c} in the back", "fill: {c}", "color: {c}", "{c} surface",
    "and the ground is {c}", "the ground in {c}", "{c}", "in {c}", "over {c}", "({c})", "[{c}]", "all {c} otherwise", "set against {c}", "bathed in {c}",
)  # fmt: skip
JOINTS = (", ", ", ", ", ", ". ", "; ", " - ", " ", " ", " and ", ": ", " / ", "? ", "! ")
ASIDES = captions.OPENERS + captions.CLOSERS
MORE_ASIDES = (
    "well", "so", "now", "right", "please", "you see", "honestly", "by the way", "in short", "to be clear", "as always", "for once", "i mean", "if that works",
    "no rush", "for our website", "for my room", "for the kitchen wall", "for a book", "as a present", "for the kids", "for a friend of mine", "on behalf of the club",
    "we need it today", "make it big", "nothing fancy", "you choose the details", "i trust you", "be creative", "it must be readable", "it's important", "good luck",
    "have fun", "like last time", "the same as before", "version two", "final version", "draft", "attempt three", "here we go", "listen", "imagine", "remember",
    "dear artist", "dear computer", "robot", "can you do that", "is that ok", "what do you think", "see you", "best regards", "this is for work", "it's a gift",
)  # fmt: skip
NOISE = 0.35  # share of sentences with an aside at either end


@dataclass(frozen=True, slots=True)
class Said:
    """One wish, briefly and as a sentence: both ask for the same picture."""

    brief: str
    sentence: str


def things(
    names: list[str], labels: list[str], place: str, upright: bool, rng: random.Random
) -> tuple[str, str]:
    """The subject said with any names and, in the same words, with the labels."""
    seed = rng.getrandbits(32)

    def said(words: list[str]) -> str:
        again = random.Random(seed)
        if len(words) == 1:
            return captions.single(words[0], place, again)
        return captions.pair(words[0], words[1], upright, again)

    return said(names), said(labels)


def sentence(subject: str, bare: str, style: str | None, behind: str | None, rng: random.Random) -> str:
    """Subject, style and background as clauses in any order, among remarks that mean nothing."""
    wish = rng.choice(WISHES).format(a=subject, bare=bare)
    clauses = [wish if rng.random() < 0.85 else subject]
    if style:
        clauses.append(rng.choice(MANNERS).format(s=style))
    if behind:
        clauses.append(rng.choice(BEHINDS).format(c=behind))
    if rng.random() < 0.4:
        rng.shuffle(clauses)
    elif len(clauses) == 3 and rng.random() < 0.5:
        clauses = [clauses[0], clauses[2], clauses[1]]
    if rng.random() < NOISE:
        clauses.insert(0, rng.choice(ASIDES + MORE_ASIDES))
    if rng.random() < NOISE:
        clauses.append(rng.choice(ASIDES + MORE_ASIDES))
    words = clauses[0]
    for clause in clauses[1:]:
        words += rng.choice(JOINTS) + clause
    return words


def said(
    chosen: list[Concept],
    style: str | None,
    ground: Ground | None,
    place: str,
    upright: bool,
    rng: random.Random,
) -> Said:
    """One or two concepts, a style's name in the picture set and a background, or None for what is not mentioned."""
    names = [captions.name_of(concept, rng) for concept in chosen]
    free, named = things(names, [concept.label for concept in chosen], place, upright, rng)
    phrase = STYLE[style].phrases[0] if style else None
    behind = captions.said(ground) if ground else None
    gradient = "gradient " if ground and not ground.pattern and ground.top != ground.bottom else ""
    brief = (
        named
        + (f" in {phrase} style" if phrase else "")
        + (f" on a {behind} {gradient}background" if behind else "")
    )
    bare = free if len(names) > 1 else names[0]
    return Said(brief=brief, sentence=sentence(free, bare, phrase, behind, rng))
