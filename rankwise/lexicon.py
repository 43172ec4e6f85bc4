"""Opinion words with their valence, domains with their nouns, sentence frames; below them, how they are read.

rankwise.corpus writes its reviews with these words, and scores any text with the reader. A valence lies in [-1, 1].

The notation of frames and of entries with {slots}:
    {name}   one choice from FRAMES, from the domain, from WORDS, or from a writing rule of rankwise.corpus
    {name!}  the same with the opposite sentiment
    {name~}  the same, conceded: its opinions weigh CONCEDED (what stands in an although-clause, or before a but)
    {name^}  the same under a negator that the frame itself spells out ("nothing about ...")
Aspects end in "+" when plural ("were") and in "*" when they take no "a" ("What superb acting!").
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

CONCEDED = 0.5  # the weight of a conceded opinion; any other weighs 1
SCOPED = -0.7  # the factor of a negator that reaches over the whole clause

# Adjectives, by the kind of thing that they fit; "any" fits all.
ADJECTIVES: dict[str, dict[str, float]] = {
    "any": {
        "good": 0.5, "great": 0.7, "excellent": 0.85, "superb": 0.92, "wonderful": 0.88, "brilliant": 0.9,
        "lovely": 0.66, "pleasant": 0.46, "impressive": 0.68, "delightful": 0.78, "outstanding": 0.94,
        "fantastic": 0.87,
        "first-rate": 0.82, "marvellous": 0.86, "decent": 0.32, "likeable": 0.44, "memorable": 0.62, "splendid": 0.81,
        "bad": -0.5, "poor": -0.56, "awful": -0.86, "terrible": -0.88, "dreadful": -0.9, "disappointing": -0.6,
        "mediocre": -0.42, "weak": -0.48, "horrible": -0.89, "lousy": -0.7, "second-rate": -0.58, "unpleasant": -0.54,
        "forgettable": -0.4, "underwhelming": -0.45, "lacklustre": -0.47, "abysmal": -0.96, "annoying": -0.59,
        "appalling": -0.93,
    },
    "story": {
        "gripping": 0.74, "clever": 0.57, "moving": 0.63, "witty": 0.6, "inventive": 0.58, "engaging": 0.55,
        "absorbing": 0.61, "dazzling": 0.83, "subtle": 0.41, "convincing": 0.52, "enchanting": 0.76,
        "predictable": -0.43, "tedious": -0.67, "confusing": -0.46, "clumsy": -0.51, "hollow": -0.49, "dull": -0.57,
        "far-fetched": -0.38, "dreary": -0.62, "lazy": -0.53, "wooden": -0.52, "unbearable": -0.91,
    },
    "person": {
        "friendly": 0.54, "attentive": 0.59, "polite": 0.43, "helpful": 0.53, "welcoming": 0.64, "patient": 0.4,
        "cheerful": 0.51, "kind": 0.56, "charming": 0.65,
        "rude": -0.72, "careless": -0.55, "impatient": -0.44, "arrogant": -0.69, "indifferent": -0.41, "surly": -0.63,
        "slow": -0.39, "hostile": -0.84,
    },
    "food": {
        "delicious": 0.84, "tasty": 0.56, "fresh": 0.47, "tender": 0.49, "crisp": 0.37, "mouth-watering": 0.89,
        "heavenly": 0.93, "generous": 0.48,
        "bland": -0.5, "greasy": -0.52, "soggy": -0.55, "stale": -0.61, "burnt": -0.64, "watery": -0.45,
        "salty": -0.36, "inedible": -0.95, "tasteless": -0.66,
    },
    "place": {
        "cosy": 0.55, "spotless": 0.72, "elegant": 0.62, "peaceful": 0.57, "comfortable": 0.5, "airy": 0.36,
        "inviting": 0.53, "idyllic": 0.85,
        "cramped": -0.48, "filthy": -0.83, "noisy": -0.46, "shabby": -0.53, "gloomy": -0.47, "stuffy": -0.42,
        "draughty": -0.4, "squalid": -0.92,
    },
    "device": {
        "reliable": 0.6, "sturdy": 0.49, "responsive": 0.51, "sharp": 0.45, "intuitive": 0.56, "handy": 0.39,
        "polished": 0.58, "flawless": 0.95,
        "flimsy": -0.54, "sluggish": -0.49, "fragile": -0.41, "clunky": -0.46, "unreliable": -0.65, "faulty": -0.68,
        "useless": -0.87, "awkward": -0.37,
    },
    "sound": {
        "thrilling": 0.8, "lively": 0.52, "soulful": 0.64, "warm": 0.46, "rousing": 0.67, "joyful": 0.69,
        "electrifying": 0.91,
        "muffled": -0.47, "shrill": -0.56, "flat": -0.43, "lifeless": -0.66, "half-hearted": -0.5, "sloppy": -0.55,
        "excruciating": -0.94,
    },
    "price": {
        "fair": 0.42, "reasonable": 0.38, "unbeatable": 0.86,
        "steep": -0.41, "outrageous": -0.85, "excessive": -0.52,
    },
}  # fmt: skip
EXTREME = 0.8  # adjectives of at least this strength take "absolutely", the others "very"

# Words before an opinion that scale it. An adjective's strength and sign say which of them may stand before it.
INTENSIFIERS = {"very": 1.25, "really": 1.2, "quite": 0.85, "rather": 0.8, "fairly": 0.7, "remarkably": 1.3, "so": 1.22}
EXTREME_INTENSIFIERS = {"absolutely": 1.15, "truly": 1.1, "simply": 1.05, "utterly": 1.12}
SOFTENERS = {
    "a little": 0.5,
    "a bit": 0.55,
    "slightly": 0.45,
    "somewhat": 0.6,
    "far too": 1.35,
    "too": 1.15,
}  # of faults,
BEFORE_NOUN = ("very", "really", "rather", "fairly", "remarkably")  # "a rather dull plot"; "a a bit dull plot" is wrong
NEGATORS_OF_PRAISE = {
    "not": -0.6, "hardly": -0.65, "far from": -0.8, "anything but": -0.9, "not exactly": -0.5, "by no means": -0.7,
    "not particularly": -0.45,
}  # fmt: skip
NEGATORS_OF_FAULTS = {
    "not": -0.6, "far from": -0.8, "anything but": -0.9, "not at all": -0.75, "by no means": -0.7, "hardly": -0.65,
    "not remotely": -0.78,
}  # fmt: skip
# Read, not written: what a language model may say beside.
OTHER_MODIFIERS = {
    "not very": -0.4, "not so": -0.5, "not too": -0.5, "not really": -0.5, "isn't": -0.6, "wasn't": -0.6,
    "weren't": -0.6, "didn't": -0.6, "don't": -0.6, "wouldn't": -0.6, "no": -0.6,
    "extremely": 1.3, "completely": 1.15, "totally": 1.15, "incredibly": 1.3, "pretty": 0.85, "genuinely": 1.15,
    "thoroughly": 1.2,
}  # fmt: skip
VERB_MODIFIERS = {"really": 1.2, "genuinely": 1.15, "rather": 0.8}  # "I really enjoyed"
VERB_NEGATORS = {"did not": -0.6, "never": SCOPED}  # the first takes the base form
SCOPES = ("nothing about", "not once", "at no point", "neither", "no part of", "nobody found")
CONCESSIONS = ("although", "though", "even though", "despite", "in spite of", "apart from", "even if")
PIVOTS = ("but", "yet")
INERT = ("not only", "not just", "not to mention", "no doubt", "without doubt")  # look like negation and are none

# (past, base or "" where it is never negated, valence): "I adored the plot".
LIKINGS: tuple[tuple[str, str, float], ...] = (
    ("adored", "", 0.9), ("loved", "love", 0.8), ("enjoyed", "enjoy", 0.6), ("liked", "like", 0.45),
    ("admired", "admire", 0.58), ("appreciated", "appreciate", 0.48), ("relished", "relish", 0.73),
    ("treasured", "", 0.79), ("could not fault", "", 0.7), ("could not get enough of", "", 0.88),
    ("hated", "hate", -0.82), ("loathed", "", -0.92), ("disliked", "", -0.5), ("resented", "resent", -0.57),
    ("regretted", "regret", -0.54), ("minded", "mind", -0.4), ("dreaded", "", -0.62), ("detested", "", -0.88),
    ("could not stand", "", -0.8), ("soon tired of", "", -0.51),
)  # fmt: skip

DUAL_USE = ("like", "love", "mind")  # bases that mean other things as well: read only behind "did not" and its kin
REFUSALS = ("did not", "didn't", "do not", "don't", "does not", "doesn't")

# "The plot dragged", by kind of subject.
DOINGS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "any": (
        ("delighted {me}", "delight {me}", 0.77), ("impressed {me}", "impress {me}", 0.64), ("shone", "", 0.71),
        ("won {me} over", "", 0.67), ("exceeded all {my} hopes", "", 0.85), ("delivered", "deliver", 0.5),
        ("made {me} smile", "", 0.57), ("pleased {me}", "please {me}", 0.47), ("blew {me} away", "", 0.95),
        ("disappointed {me}", "disappoint {me}", -0.6), ("let {me} down", "", -0.63), ("fell short", "", -0.49),
        ("annoyed {me}", "annoy {me}", -0.55), ("missed the mark", "", -0.52),
        ("irritated {me}", "irritate {me}", -0.58),
        ("left {me} cold", "", -0.66), ("spoiled everything", "", -0.87), ("infuriated {me}", "", -0.84),
    ),
    "story": (
        ("gripped {me}", "grip {me}", 0.69), ("dazzled {me}", "dazzle {me}", 0.81), ("stole the show", "", 0.75),
        ("rang true", "ring true", 0.53), ("dragged", "drag", -0.53), ("fell flat", "", -0.56),
        ("bored {me}", "bore {me}", -0.62), ("made no sense", "", -0.68), ("fell apart", "", -0.71),
    ),
    "person": (
        ("made {me} feel at home", "", 0.74), ("went the extra mile", "", 0.78), ("put {me} at ease", "", 0.55),
        ("ignored {me}", "ignore {me}", -0.61), ("kept {me} waiting", "", -0.47),
        ("treated {me} like a nuisance", "", -0.83),
    ),
    "food": (
        ("hit the spot", "", 0.63), ("tasted like heaven", "", 0.91), ("melted in the mouth", "", 0.8),
        ("tasted like cardboard", "", -0.73), ("turned {my} stomach", "", -0.9), ("tasted of nothing", "", -0.57),
    ),
    "place": (
        ("charmed {me}", "charm {me}", 0.62), ("felt like home", "feel like home", 0.65), ("sparkled", "sparkle", 0.59),
        ("smelled of damp", "", -0.59), ("needed a good scrub", "", -0.51), ("had seen better days", "", -0.44),
    ),
    "device": (
        ("worked like a dream", "", 0.82), ("made life easier", "", 0.61), ("held up nicely", "", 0.43),
        ("kept freezing", "", -0.65), ("broke within days", "", -0.85), ("wore {me} out", "", -0.5),
    ),
    "sound": (
        ("gave {me} goosebumps", "", 0.86), ("lifted the whole room", "", 0.7), ("soared", "soar", 0.66),
        ("hurt {my} ears", "", -0.74), ("grated", "grate", -0.54), ("ran out of steam", "", -0.46),
    ),
    "price": (
        ("felt like a bargain", "", 0.68), ("felt like a rip-off", "", -0.77),
    ),
}  # fmt: skip

# "The plot was ..."
IDIOMS = {
    "worth every penny": 0.78, "second to none": 0.89, "a real treat": 0.76, "a pure joy": 0.83, "hard to beat": 0.61,
    "a triumph": 0.87, "spot on": 0.59, "out of this world": 0.96, "a happy surprise": 0.56,
    "a cut above the rest": 0.65,
    "a breath of fresh air": 0.69, "nothing short of magic": 0.92,
    "a mess": -0.64, "a letdown": -0.61, "a waste of money": -0.78, "a disgrace": -0.91, "beyond a joke": -0.75,
    "nothing to write home about": -0.37, "below par": -0.48, "a sore point": -0.45, "not up to scratch": -0.53,
    "a disaster": -0.89, "hard to forgive": -0.67, "a chore": -0.51,
}  # fmt: skip
# "The plot was ... the trailer"
COMPARISONS = {
    "better than": 0.48, "far better than": 0.72, "a step up from": 0.46, "every bit as good as": 0.58,
    "leagues ahead of": 0.84, "more rewarding than": 0.54,
    "worse than": -0.5, "far worse than": -0.76, "a step down from": -0.46, "nowhere near as good as": -0.62,
    "no match for": -0.43, "more tiresome than": -0.56,
}  # fmt: skip
SUPERLATIVES = {
    "best": 0.9, "finest": 0.84, "loveliest": 0.75, "most satisfying": 0.7, "most enjoyable": 0.66,
    "worst": -0.9, "dullest": -0.68, "poorest": -0.65, "most frustrating": -0.7, "most pointless": -0.74,
}  # fmt: skip
# Clauses about the whole, no aspect named; "event" ones need something that takes place.
EXPERIENCES = {
    "{i} could not stop smiling": 0.74, "{i} felt spoiled in the best way": 0.79, "it made {my} week": 0.8,
    "{i} came away glowing": 0.71, "{i} felt lucky": 0.55,
    "{i} lost patience": -0.58, "{i} felt cheated": -0.77, "it ruined {my} week": -0.86, "{i} wanted a refund": -0.72,
    "{i} came away cross": -0.6,
}  # fmt: skip
EVENT_EXPERIENCES = {
    "the time flew by": 0.62, "{i} never wanted it to end": 0.82, "{i} left with a grin": 0.64,
    "{i} could have stayed all night": 0.68,
    "{i} kept looking at the clock": -0.55, "{i} could not wait to leave": -0.75, "{i} left with a frown": -0.48,
    "{i} nearly walked out": -0.81,
}  # fmt: skip
# What {i} would do next; the frames supply "{i} would".
RESOLVES = {
    "gladly do it again": 0.66, "recommend it": 0.6, "urge anyone to try it": 0.75, "happily pay twice as much": 0.85,
    "not change a thing": 0.77, "not recommend it": -0.6, "warn anyone against it": -0.76, "not do it again": -0.57,
    "rather have stayed at home": -0.65, "rather forget about it": -0.7,
}  # fmt: skip
ADVICE = {
    "do not miss it": 0.72, "treat yourself": 0.63, "go while you can": 0.56, "believe the praise": 0.6,
    "grab the chance": 0.65,
    "save your money": -0.66, "steer clear": -0.71, "look elsewhere": -0.54, "do not bother": -0.69,
    "think twice": -0.41,
}  # fmt: skip
MARKS = {
    "full marks": 0.84, "ten out of ten": 0.95, "eight out of ten": 0.65, "a big thumbs up": 0.73, "five stars": 0.88,
    "low marks": -0.55, "one out of ten": -0.92, "three out of ten": -0.62, "a firm thumbs down": -0.73,
    "one star": -0.85,
}  # fmt: skip

WORDS: dict[str, tuple[str, ...]] = {
    "when": (
        "last {day}", "on {day} night", "on {day} afternoon", "on a {weather} {day}", "one {day} in {month}",
        "early in {month}", "late in {month}", "at the end of {month}", "in the second week of {month}",
        "{few} weeks ago", "{few} days ago", "a month ago", "over the weekend", "yesterday evening",
        "just before {holiday}",
        "the week after {holiday}", "{few} days before {holiday}", "during the school holidays",
        "on the way home from work",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "October", "November"),
    "weather": ("wet", "grey", "windy", "foggy", "snowy", "frosty", "mild", "humid"),
    "holiday": ("Christmas", "Easter", "New Year", "my exam", "the move", "my birthday"),
    "companion": (
        "my sister", "my brother", "a colleague", "an old friend", "my neighbour", "my cousin", "my aunt", "my father",
        "my mother", "a friend from college", "my partner", "my flatmate", "my uncle", "my daughter", "my son",
    ),
    "with_i": (
        "with {companion}", "on my own", "with two friends", "with {companion} and {companion}",
        "with three colleagues",
        "with the children",
    ),
    "with_we": (
        "with {companion}", "with the children", "with two friends", "with the whole family", "as a couple",
    ),
    "why": (
        "for a birthday", "to mark an anniversary", "after a long day at work", "on the advice of {companion}",
        "instead of staying in", "to celebrate a new job", "because {companion} had mentioned it",
        "after reading about it",
        "to kill an afternoon", "with a voucher from {companion}", "after the move to {city}",
        "as part of a family trip",
    ),
    "prior": (
        "a morning of meetings", "a walk through town", "hearing about it on the radio", "three months of waiting",
        "a long drive north", "talking it over with {companion}", "a week of night shifts", "an exam in the morning",
        "a short notice in the paper", "a delayed train from {city}",
    ),
    "city": ("Leeds", "Porto", "Bergen", "Ghent", "Turin", "Cork", "Lyon", "Basel", "York", "Malmo"),
    "number": ("four", "six", "nine", "twelve", "fifteen", "twenty", "thirty"),
    "few": ("two", "three", "four", "five"),
    "hour": ("six", "seven", "half past seven", "eight", "half past eight", "nine"),
    "manner": (
        "on the whole", "in my view", "all in all", "in the end", "to my mind", "this time", "at first",
        "from where {i} sat",
        "to {my} surprise", "as far as {i} could tell", "if you ask {me}", "for once", "by the end",
        "more than anything",
        "looking back", "overall",
    ),
    "throughout": (
        "from start to finish", "right up to the end", "almost every time", "most of the time", "in every respect",
        "for the most part", "from the first minute", 
    ),
    "summing": (
        "in short", "all told", "for {my} part", "in sum", "after all that", "weighing it up", "put simply",
    ),
    "seemed": ("seemed", "felt", "looked", "turned out", "proved"),
    "said": ("thought", "said", "felt", "insisted", "noticed", "agreed", "remarked", "admitted"),
    "judge": (
        "{companion}", "everyone", "{companion} and {companion}", "the people beside {me}", "both of {my} friends",
    ),
    "called": ("called", "considered", "found", "judged", "declared"),
    "period": (
        "in years", "of the year", "in a long time", "so far this year", "since the spring", "in recent memory",
        "for a decade", "of the last ten years",
    ),
    "audience": (
        "to anyone", "to {my} friends", "to {companion}", "to people like {me}", "to a stranger", "to the whole family",
    ),
    "struck": ("struck", "surprised", "stayed with"),
    "when_month": ("March", "the spring", "Easter", "last summer", "October", "the new year", "the autumn"),
    "nth": ("first", "second", "third", "fourth"),
}  # fmt: skip
PERSONS = {
    "I": {"i": "I", "me": "me", "my": "my", "with": "{with_i}"},
    "we": {"i": "we", "me": "us", "my": "our", "with": "{with_we}"},
}

# Slots that judge the whole: a review never contradicts itself in them.
WHOLE = {"superlative", "experience", "resolve", "advice", "marks"}

# Transparent rules: what they spell out is part of a sentence's frame (everything above counts as a slot).
FRAMES: dict[str, tuple[str, ...]] = {
    "opener": (
        "{when}, {i} {did} {thing} {with}", "{i} {did} {thing} {with} {when}", "{i} {did} {thing} {where} {when}",
        "{companion} talked {me} into {doing} {thing} {when}", "{companion} suggested {doing} {thing} {why}",
        "{i} first heard of {thing} from {companion} {when}", "{why}, {i} {did} {thing} {where}",
        "after {prior}, {i} {did} {thing} {with}", "it was {companion} who first told {me} about {thing} {when}",
        "{i} {did} {thing} {where} {why}", "{when}, after {prior}, {i} {did} {thing}",
        "{companion} had been talking about {thing} since {when_month}",
        "{i} had planned on {doing} {thing} since {when_month}",
        "{own_opener}", "{own_opener}", "{own_opener}",
    ),
    # A clause: one or two opinions of one polarity, no comma inside (a comma would end a concession).
    "clause": (
        "the {aspect} {was} {adj}", "the {aspect} {was} {adj}", "the {aspect} {seemed} {graded}",
        "the {aspect} {did_so}",
        "the {aspect} {did_so}", "{i} {felt_so} the {target}", "{i} {felt_so} the {target}",
        "{i} found the {aspect} {graded}",
        "the {aspect} {was} {idiom}", "the {aspect} {was} {compared} {rival}", "the {aspect} {was} {adj} {throughout}",
        "the {aspect} {did_so} {throughout}", "{i} {felt_so} the {target} {throughout}",
        "{judge} {said} the {aspect} {was} {adj}", "{judge} {called} the {aspect} {graded}",
        "{judge} {felt_so} the {target}",
        "there was something {graded} about the {aspect}", "it was the {aspect} that {did_so}",
        "what {struck} {me} was how {plainadj} the {aspect} {was}", "{i} {felt_so} the {bare}", "the {bare} {did_so}",
        "{experience}", "it was the {superlative} {whole} {period}", "there was {attr} and {attr}",
        "the {aspect} {was} {plainadj} and the {aspect} {adj}", "the {aspect} and the {peer} were {adj}",
        "nothing about the {aspect} was {plainadj^}", "at no point did the {aspect} seem {plainadj^}",
        "not once did {i} find the {aspect} {plainadj^}", "neither the {aspect} nor the {peer} {was} {plainadj^}",
        "{i} thought the {aspect} {graded}", "the {aspect} {was} {plainadj} and {plainadj}",
        "with the {bare} came {attr}", "{i} remember {attr} above all",
        "the {aspect} {was} {idiom} {throughout}",
        "{judge} {said} the {aspect} {did_so}", "{judge} {said} the {aspect} {was} {idiom}",
        "{i} would call the {aspect} {graded}", "few things {struck} {me} like the {bare}",
    ),
    "judgement": (
        "{clause}.", "{clause}.", "{manner}, {clause}.", "{manner}, {clause}.", "{clause}, and {clause}.",
        "{clause}; {clause}.",
        "{clause}, and {manner} {clause}.", "what {exclaimed}!", "{clause}: {attr} and {attr}.",
        "{attr}, {attr}: {clause}.",
        "besides the {bare}, {clause}.", "{i} began with the {bare}: {clause}.",
        "from the {bare} to the {bare}, {clause}.", "{clause}, just as the {aspect} {did_so}.",
        "on top of the {bare}, {clause}.", "because the {aspect} {did_so}, {clause}.",
        "{experience}, because the {aspect} {did_so}.", "the {aspect} {was} {adj}, the {aspect} {adj}.",
    ),
    "contrast": (
        "although {clause!~}, {clause}.", "{clause!~}, but {clause}.", "{clause}, even though {clause!~}.",
        "even if {clause!~}, {clause}.", "despite the {bare!~}, {clause}.", "apart from the {bare!~}, {clause}.",
        "{clause}, although {clause!~}.", "{clause}, whereas {clause!}.", "{clause!~}, yet {clause}.",
        "in spite of the {bare!~}, {clause}.", "{manner}, {clause!~}, but {clause}.", "{clause}, despite the {bare!~}.",
        "the {aspect!~} {was} {adj!~}, but the {aspect} {did_so}.", "even though {clause!~}, {clause}.",
    ),
    "fact": (
        "{own_fact}", "{own_fact}", "{own_fact}", "{companion} came along as well.",
        "{i} paid with a voucher from {companion}.",
        "it had rained since {hour} in the morning.", "{companion} drove {me} there and back.",
        
        "{i} had set aside {few} hours.", "{companion} joined {me} after {number} minutes.",
        "{i} made notes for {companion}.", "{companion} and I talked for {number} minutes afterwards.",
    ),
    "closing": (
        "{i} would {resolve}.", "{summing}, {i} would {resolve}.", "{summing}, {advice}.", "{advice}.",
        "{marks} from {me}.",
        "{summing}, {marks}.", "{summing}, it was the {superlative} {whole} {period}.", "{clause}, so {advice}.",
        "{clause}, so {i} would {resolve}.", "{advice}: {clause}.", "{clause}: {marks} from {me}.",
        "{summing}, {clause}.",
        "{companion} and I would {resolve}.", "{summing}, {experience}.",
    ),
}  # fmt: skip

# What a domain brings: its aspects by kind (a kind of ADJECTIVES and DOINGS), and its own choices for slots.
DOMAINS: dict[str, dict[str, tuple[str, ...]]] = {
    "film": {
        "story": (
            "acting*", "script", "plot", "dialogue*", "ending", "pacing*", "lead actor", "villain", "camera work*",
            "jokes+",
            "costumes+", "opening scene", "chase scenes+", "cast", "film", "romance", "final act", "second half",
        ),
        "sound": ("soundtrack", "title song"),
        "place": ("auditorium", "foyer"),
        "price": ("ticket price",),
        "did": ("saw", "watched", "caught", "went to see"),
        "doing": ("seeing", "watching"),
        "thing": ("{title}",),
        "title": ("The {first} {second}", "The {first} {second}", "{second} of {city}", "{first} {second}"),
        "first": (
            "Silent", "Paper", "Northern", "Winter", "Crooked", "Second", "Seventh", "Hidden", "Distant", "Borrowed",
        ),
        "second": ("Harbour", "Witness", "Orchard", "Letter", "Garden", "Island", "Bridge", "House", "River", "Doctor"),
        "where": (
            "at the cinema on Mill Street", "at the old cinema in {city}", "in a village hall near {city}",
            "at a festival in {city}",
        ),
        "whole": ("film", "story", "night out"),
        "rival": ("the trailer", "the first part", "the book behind it", "most films about {city}"),
        "own_opener": (
            "the screening of {title} {where} began at {hour}", "two tickets for {title} came from {companion} {when}",
            "{i} came across {title} {where} {when}",
        ),
        "own_fact": (
            "the film runs for about {few} hours.", "the story moves from {city} to {city}.",
            "about {number} people were in the room.",
            "the story was filmed in {city} over {few} months.", "{i} sat in row {number}.",
            "the plot follows {few} sailors from {city}.",
        ),
    },
    "restaurant": {
        "food": (
            "soup", "bread*", "fish*", "lamb", "dessert", "salad", "starters+", "main course", "noodles+",
            "vegetables+",
            "pie",
            "sauce", "coffee*", "meal", "chips+",
        ),
        "person": ("waiter", "staff*", "chef", "service*"),
        "place": ("dining room", "terrace", "corner table"),
        "price": ("bill", "price of the wine"),
        "did": ("had dinner at", "ate at", "had lunch at", "booked a table at", "stopped at"),
        "doing": ("eating at", "having dinner at", "meeting at"),
        "thing": ("the {sign}",),
        "sign": ("{first} {second}",),
        "first": ("Copper", "Blue", "Red", "Old", "Green", "White", "Black", "Iron", "Little", "Marble"),
        "second": ("Kettle", "Lantern", "Anchor", "Mill", "Olive", "Heron", "Barrel", "Spoon", "Table", "Fig"),
        "where": (
            "near the station", "by the river", "on the main square in {city}", "behind the market",
            "in the centre of {city}",
        ),
        "whole": ("meal", "dinner", "evening"),
        "rival": (
            "the place next door", "anything on the main square", "the food at home", "the last restaurant {i} tried",
        ),
        "own_opener": (
            "{i} got a table for {few} at the {sign} {when}", "the {sign} has stood {where} for {number} years",
            "{companion} chose the {sign} {where} {why}",
        ),
        "own_fact": (
            "{i} ordered {few} dishes to share.", "the menu changes every {few} weeks.",
            "{i} sat beside the window.",
            "the kitchen closes at {hour}.", "{i} stayed for about {few} hours.", "the chef trained in {city}.",
        ),
    },
    "book": {
        "story": (
            "plot", "prose*", "ending", "first chapter", "dialogue*", "heroine", "narrator", "twist", "characters+",
            "novel",
            "middle section", "writing*", "letters+", "descriptions+", "mystery", "last page", "family history",
            "style",
        ),
        "device": ("binding", "paper cover"),
        "price": ("cover price",),
        "did": ("read", "picked up", "started", "borrowed", "bought"),
        "doing": ("reading", "trying", "buying"),
        "thing": ("{novel}", "{novel} by {author}", "{author}'s {novel}"),
        "novel": ("The {first} {second}", "A {second} of {first}", "{second} and {first}", "The {second} Home"),
        "first": ("Salt", "Glass", "Winter", "Lighthouse", "Sea", "Stone", "Paper", "Amber"),
        "second": ("Ferry", "Clerk", "Map", "Road", "Room", "Diary", "Kingdom", "Bell"),
        "author": ("Ana Holt", "Peter Lund", "Mira Castle", "Tom Varga", "Ida Brook"),
        "where": ("on the train to {city}", "in a hammock", "from the library in {city}", "at the kitchen table"),
        "whole": ("novel", "book", "story"),
        "rival": ("the first volume", "the film of it", "{author}'s early work", "the last thing {i} read"),
        "own_opener": (
            "{my} copy of {novel} came from {companion} {when}", "{my} book club chose {novel} by {author} {when}",
            "{author} wrote {novel} over {number} years in {city}",
        ),
        "own_fact": (
            "the book has {few} hundred pages.", "the story is set in {city} and {city}.",
            "{i} read the book over {few} evenings.",
            "the novel covers {few} generations of one family.", "{i} read parts aloud to {companion}.",
            "each part opens in {city}.",
        ),
    },
    "hotel": {
        "place": (
            "room", "bathroom", "lobby", "garden", "suite", "balcony", "pool", "breakfast room", "rooftop bar",
            "corridors+",
            "hotel", "view", "spa",
        ),
        "person": ("receptionist", "porter", "cleaners+", "manager", "concierge"),
        "food": ("breakfast", "coffee*", "buffet"),
        "price": ("room rate", "price of parking"),
        "did": ("stayed at", "spent {few} nights at", "booked a room at", "checked in to"),
        "doing": ("staying at", "booking"),
        "thing": ("the {inn}",),
        "inn": ("Hotel {second}", "{first} Hotel"),
        "first": ("Park", "Station", "Bay", "Castle", "Bridge", "Lake", "Corner", "Tower", "Market", "Forest"),
        "second": ("Marlow", "Aurora", "Linden", "Meridian", "Florian", "Tessa", "Ravel", "Helix", "Orlando", "Sable"),
        "where": ("in {city}", "near the beach", "beside the lake", "across from the station", "on the edge of {city}"),
        "whole": ("hotel", "stay", "holiday"),
        "rival": ("the photos", "the hostel in {city}", "the hotel across the road", "{my} room at home"),
        "own_opener": (
            "{i} arrived at the {inn} {when} after {prior}",
            "the {inn} stands {where}, {number} minutes from the harbour",
            "{my} room at the {inn} {where} was on floor {number}",
        ),
        "own_fact": (
            "{i} had a room on the {nth} floor.", "check-in opens at {hour}.",
            "the beach is {number} minutes away on foot.",
            "{i} stayed for {few} nights.", "the building dates from the {nth} half of the century.",
            "there was a wedding party of {number} in the lobby.",
        ),
    },
    "gadget": {
        "device": (
            "battery", "screen", "charger", "casing", "software*", "menus+", "buttons+", "keyboard", "camera lens",
            "design",
            "setup*", "touch pad", "hinge", "wireless link", "app", "manual",
        ),
        "sound": ("speaker", "ring tone"),
        "person": ("support team", "shop assistant"),
        "price": ("price", "repair fee"),
        "did": ("bought", "ordered", "switched to", "picked up", "unpacked"),
        "doing": ("buying", "trying", "ordering"),
        "thing": ("the {make}", "a {make}", "this {make}"),
        "make": ("{first} {second}",),
        "first": ("Nordel", "Kivo", "Tamsin", "Orbit", "Lumo", "Peako", "Vesta", "Junio"),
        "second": ("phone", "tablet", "camera", "laptop", "watch", "reader", "recorder"),
        "where": ("online", "at the shop in {city}", "through work", "at the airport in {city}"),
        "whole": ("gadget", "purchase", "device"),
        "rival": ("{my} old one", "the last model", "the one {companion} has", "most of what the shops sell"),
        "own_opener": (
            "the {make} reached {me} {when} in a grey box", "{my} {make} came from the shop in {city} {when}",
            "{companion} handed {me} a {make} {when}",
        ),
        "own_fact": (
            "the device weighs about {few} hundred grams.", "the battery charges in {few} hours.",
            "{i} have used the thing for {few} weeks.",
            "{i} took the device to {city} and back.", "the box holds a cable and {few} adapters.",
            "the makers sell {few} colours.",
        ),
    },
    "concert": {
        "sound": (
            "band", "singer", "drummer", "choir", "string section", "encore", "guitar solo", "new songs+", "old songs+",
            "finale",
            "sound*", "concert", "piano part", "harmonies+", "opening act", "second set",
        ),
        "place": ("hall", "bar upstairs"),
        "person": ("door staff", "crowd"),
        "price": ("ticket price", "cost of a drink"),
        "did": ("saw", "heard", "went to hear", "queued for"),
        "doing": ("seeing", "hearing"),
        "thing": ("{group}",),
        "group": ("the {first} {second}", "the {first} {second}", "the {city} {second}"),
        "first": ("Velvet", "Paper", "Harbour", "Tin", "Night", "Seven", "Northern", "Electric", "Last", "Tidal"),
        "second": (
            "Pilots", "Quartet", "Moons", "Choir", "Engines", "Sailors", "Gardeners", "Orchestra", "Foxes", "Brothers",
        ),
        "where": (
            "at the town hall", "in the park in {city}", "at the theatre in {city}", "in a church near {city}",
            "on the pier",
        ),
        "whole": ("concert", "show", "night out"),
        "rival": ("the album", "the support act", "the show in {city}", "the last tour"),
        "own_opener": (
            "{group} played {where} {when}", "the doors opened at {hour} {when} and {group} began later",
            "tickets for {group} {where} were a present from {companion}",
        ),
        "own_fact": (
            "they played for about {few} hours.", "there were {few} hundred people {where}.",
            "{i} stood near row {number}.",
            "the tour goes on to {city}.", "the first song was about {city}.", "the group has {number} members.",
        ),
    },
}  # fmt: skip


# Looking up ---------------------------------------------------------------------------------------------------------


class Aspect(NamedTuple):
    """Something of a domain that one can have an opinion on."""

    noun: str
    kind: str  # of ADJECTIVES
    plural: bool
    mass: bool  # takes no "a"


@functools.cache
def aspects(domain: str) -> tuple[Aspect, ...]:
    """The aspects of a domain, its notation read."""
    return tuple(
        Aspect(noun.rstrip("+*"), kind, noun.endswith("+"), noun.endswith("*"))
        for kind in ADJECTIVES
        for noun in DOMAINS[domain].get(kind, ())
    )


@functools.cache
def choices(domain: str) -> dict[str, dict[str, float]]:
    """The slots whose every choice is an opinion of its own."""
    events = {} if domain == "gadget" else EVENT_EXPERIENCES
    return {
        "idiom": IDIOMS, "compared": COMPARISONS, "superlative": SUPERLATIVES, "resolve": RESOLVES,
        "advice": ADVICE, "marks": MARKS, "experience": EXPERIENCES | events,
    }  # fmt: skip


# Reading -------------------------------------------------------------------------------------------------------------


class Opinion(NamedTuple):
    """An opinion as written or as read."""

    lexeme: str  # the expression, whatever its form
    value: float  # in [-1, 1], after negation and intensifiers
    weight: float  # CONCEDED or 1


class Entry(NamedTuple):
    """What a known phrase does to the reading."""

    role: str  # "opinion" | "modifier" | "scope" | "concession" | "pivot" | "inert"
    value: float  # an opinion's valence, a modifier's or scope's factor
    lexeme: str  # shared by all the forms of one expression
    scales: bool  # whether an intensifier in front of it counts ("so" before an imperative is none)


def score(opinions: Iterable[Opinion]) -> float:
    """The shrunk weighted mean of the distinct opinions, in (-1, 1); rankwise.corpus says why."""
    first = {}
    for opinion in opinions:
        first.setdefault((opinion.lexeme, opinion.value > 0), opinion)
    weight = sum(opinion.weight for opinion in first.values())
    return sum(opinion.weight * opinion.value for opinion in first.values()) / (1.0 + weight)


def clip(value: float) -> float:
    """Keep a valence in [-1, 1]."""
    return max(-1.0, min(1.0, value))


_TOKEN = re.compile(r"[a-z]+(?:['-][a-z]+)*|[.!?;:,]")


def read(text: str, start: int) -> list[Opinion]:
    """The opinions of a text, in order, that end after character `start`."""
    tokens = list(_TOKEN.finditer(text.lower().replace("’", "'")))
    words = [token.group() for token in tokens]
    found: list[Opinion] = []
    sentence = 0  # where in `found` this sentence begins
    factor = scope = weight = 1.0
    reach = 0  # how many unknown words a pending negator still survives
    at = 0
    while at < len(words):
        word = words[at]
        entry, size = _match(words, at)
        at += size
        if entry is None:
            if word in ".!?;:,":
                factor = scope = weight = 1.0
                if word in ".!?":
                    sentence = len(found)
            elif word not in ("a", "an"):
                factor = factor if factor < 0 and reach > 0 else 1.0
                reach -= 1
            continue
        role, value, lexeme, scales = entry
        if role == "modifier":
            factor, reach = factor * value, 1
            continue
        if role == "opinion" and tokens[at - 1].end() > start:
            by = factor if scales or factor < 0 else 1.0
            found.append(Opinion(lexeme, clip(value * by * scope), weight))
        elif role == "scope":
            scope = value
        elif role == "concession":
            weight = CONCEDED
        elif role == "pivot":
            found[sentence:] = [opinion._replace(weight=CONCEDED) for opinion in found[sentence:]]
            scope = weight = 1.0
        factor = 1.0
    return found


def _match(words: list[str], at: int) -> tuple[Entry | None, int]:
    """The longest known phrase that starts here and its length in words; (None, 1) where there is none."""
    phrases, longest = known_phrases()
    for size in range(min(longest.get(words[at], 0), len(words) - at), 0, -1):
        if entry := phrases.get(tuple(words[at : at + size])):
            return entry, size
    return None, 1


def _merged(*tables: dict[str, float]) -> dict[str, float]:
    """One table of several; an expression in two of them must be worth the same in both."""
    merged: dict[str, float] = {}
    for phrase, value in itertools.chain.from_iterable(table.items() for table in tables):
        assert merged.setdefault(phrase, value) == value, f"{phrase!r} has two values"
    return merged


@functools.cache
def known_phrases() -> tuple[dict[tuple[str, ...], Entry], dict[str, int]]:
    """Every known phrase by its words, and the length in words of the longest one that starts with a word."""
    table: dict[tuple[str, ...], Entry] = {}

    def know(phrase: str, role: str, value: float, lexeme: str = "", scales: bool = False) -> None:
        for person in PERSONS.values():
            form = phrase.format(**person).lower()
            table[tuple(_TOKEN.findall(form))] = Entry(role, value, lexeme or phrase, scales)

    scales = (INTENSIFIERS, EXTREME_INTENSIFIERS, SOFTENERS, VERB_MODIFIERS, OTHER_MODIFIERS)
    negators = (NEGATORS_OF_PRAISE, NEGATORS_OF_FAULTS, VERB_NEGATORS)
    for phrase, value in _merged(*scales, *negators).items():
        know(phrase, "modifier", value)
    for role, value, phrases in (
        ("concession", 1.0, CONCESSIONS),
        ("pivot", 1.0, PIVOTS),
        ("inert", 1.0, INERT),
        ("scope", SCOPED, SCOPES),
    ):
        for phrase in phrases:
            know(phrase, role, value)
    for phrase, value in _merged(*ADJECTIVES.values()).items():
        know(phrase, "opinion", value, scales=True)
    for past, base, value in itertools.chain(LIKINGS, *DOINGS.values()):
        know(past, "opinion", value, scales=True)
        if base in DUAL_USE:
            for refusal in REFUSALS:
                know(f"{refusal} {base}", "opinion", value * VERB_NEGATORS["did not"], lexeme=past)
        elif base:
            know(base, "opinion", value, lexeme=past, scales=True)
    wholes = (IDIOMS, COMPARISONS, SUPERLATIVES, EXPERIENCES, EVENT_EXPERIENCES, RESOLVES, ADVICE, MARKS)
    for phrase, value in _merged(*wholes).items():
        know(phrase, "opinion", value)
    longest: dict[str, int] = {}
    for words in table:
        longest[words[0]] = max(longest.get(words[0], 0), len(words))
    return table, longest
