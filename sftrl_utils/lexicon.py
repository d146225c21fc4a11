"""Words of the graded-acceptability grammar, with the forms that its constructions need."""

from typing import NamedTuple


class Noun(NamedTuple):
    """A person: singular, plural and the reflexive of the singular (None where it may be either)."""

    sg: str
    pl: str
    reflexive: str | None = None


class Verb(NamedTuple):
    """Base, third person singular, past and past participle."""

    base: str
    s: str
    past: str
    participle: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _nouns(text: str, reflexive: str | None = None) -> tuple[Noun, ...]:
    pairs = (word.split("/") for word in text.split())
    return tuple(Noun(pair[0], pair[1] if len(pair) > 1 else pair[0] + "s", reflexive) for pair in pairs)


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(Verb(*word.split("/")) for word in text.split())


MEN = _nouns("boy king uncle prince waiter actor monk grandfather brother father son husband nephew man/men", "himself")
WOMEN = _nouns(
    "girl queen aunt princess/princesses waitress/waitresses actress/actresses nun grandmother sister "
    "mother daughter wife/wives niece woman/women",
    "herself",
)
ROLES = _nouns(
    "teacher doctor farmer pilot student lawyer driver painter singer writer baker guard dancer nurse "
    "senator judge clerk sailor gardener reporter tourist neighbour chef poet"
)
PEOPLE = MEN + WOMEN + ROLES

# What one person does to another.
SOCIAL = _verbs(
    "see/sees/saw/seen help/helps/helped/helped admire/admires/admired/admired visit/visits/visited/visited "
    "praise/praises/praised/praised blame/blames/blamed/blamed follow/follows/followed/followed "
    "trust/trusts/trusted/trusted thank/thanks/thanked/thanked call/calls/called/called meet/meets/met/met "
    "find/finds/found/found know/knows/knew/known invite/invites/invited/invited "
    "remember/remembers/remembered/remembered greet/greets/greeted/greeted watch/watches/watched/watched "
    "hear/hears/heard/heard hire/hires/hired/hired warn/warns/warned/warned avoid/avoids/avoided/avoided "
    "choose/chooses/chose/chosen forget/forgets/forgot/forgotten like/likes/liked/liked "
    "respect/respects/respected/respected support/supports/supported/supported "
    "recognise/recognises/recognised/recognised describe/describes/described/described"
)
# What a person can do to himself or herself as well as to another.
REFLEXIVE = tuple(verb for verb in SOCIAL if verb.base in {
    "see", "help", "admire", "praise", "blame", "trust", "describe", "remember", "watch", "hear", "respect",
    "support", "recognise", "warn",
})  # fmt: skip
# What a person does to a thing.
HANDLE = _verbs(
    "buy/buys/bought/bought sell/sells/sold/sold carry/carries/carried/carried take/takes/took/taken "
    "steal/steals/stole/stolen hide/hides/hid/hidden lose/loses/lost/lost clean/cleans/cleaned/cleaned "
    "drop/drops/dropped/dropped move/moves/moved/moved break/breaks/broke/broken wash/washes/washed/washed "
    "keep/keeps/kept/kept bring/brings/brought/brought paint/paints/painted/painted "
    "examine/examines/examined/examined throw/throws/threw/thrown draw/draws/drew/drawn "
    "choose/chooses/chose/chosen forget/forgets/forgot/forgotten"
)
# Verbs whose past is not their participle: "has took" is a known non-standard form.
IRREGULAR = tuple(verb for verb in HANDLE if verb.past != verb.participle)
# What a person does on purpose, so that an adverb of manner goes with it.
DELIBERATE = tuple(verb for verb in HANDLE if verb.base not in {"lose", "drop", "break", "forget"})
# What a person does, to nobody, in three classes: only the first is at home after "there" ("there arrived
# two boys"), and only the second tires one out ("laughed themselves tired"). Past forms suffice.
ARRIVING = ("arrived", "appeared", "waited", "lingered", "knelt", "emerged")
NOISY = ("laughed", "coughed", "cried", "yawned", "giggled", "sneezed", "sighed", "snored", "sobbed")
SILENT = ("wept", "smiled", "trembled", "blushed", "hesitated", "fainted", "stumbled", "shivered", "frowned")
GIVE = ("gave", "handed", "lent", "sent", "showed", "offered", "sold", "passed")
LATINATE = ("delivered", "donated", "returned", "transferred")
PARTICLE = (
    ("picked", "up"), ("threw", "away"), ("took", "out"), ("put", "away"), ("brought", "back"),
    ("gave", "away"), ("cleaned", "up"), ("sent", "back"), ("wrapped", "up"), ("handed", "over"),
)  # fmt: skip

THINGS = _words(
    "letter book map box key table chair picture cup bottle lamp coat bag basket clock ladder rope wheel "
    "plate candle mirror blanket carpet guitar camera painting newspaper hammer bucket pillow"
)
PLACES = _words("garden kitchen park station library market village theatre museum office harbour castle church school")
ADJECTIVES = _words(
    "tall young old quiet clever kind proud tired angry famous friendly nervous honest lazy polite rich "
    "poor strong brave careful"
)
ADVERBS = _words("quickly slowly carefully quietly secretly gladly calmly eagerly gently proudly")
NEAR = ("near", "behind", "beside", "next to")
