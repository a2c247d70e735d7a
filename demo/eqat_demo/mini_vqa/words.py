"""Pictures of a word: some are kept for the test, so that reading is told from knowing.

Each letter is drawn in a column of its own, two to a square of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.scenes import COLOURS, GRID
from eqat_mm.runtime.seeding import derive_seed

LETTERS = 2 * GRID
"""Letters that fit in a row."""

HELD_OUT, SEEN = "word_held_out", "word"
"""Families of questions, by whether training shows the word."""

_LIST = """
able acid actor address after again agent album alone anchor angle animal answer apple april arch arm army arrow
artist aunt autumn baby bacon badge bag balance ball banana band bank barn basket bath battery beach bean bear beard
bed beef bell belt bench berry bicycle bird blanket block board boat body bone book boot border bottle bowl box brain
branch brass bread breakfast breath brick bridge brother brush bucket build bull burn bus butter button cabin cable
cake camel camera camp canal candle candy cannon canvas captain card cargo carpet carrot cart castle cat cattle cave
ceiling cellar chain chair chalk channel cheese cherry chest chicken child chimney church cinema circle city clay
clock cloth cloud club coal coast coat coffee coin collar colour column comb compass concert cook copper coral cord
corn corner cotton couch cough country course court cousin cover cow cream creek crew crop cross crowd crown cup
curtain cushion dance danger daughter dawn day deck deer degree dentist desert desk dinner dish doctor dog dollar
donkey door dragon drawer dream dress drink drum duck dust eagle ear earth east edge egg elbow engine entrance evening
expert eye fabric face factory fairy family farm father feather fence ferry fever field finger fire fish flag flame
floor flour flower fog forest fork fountain fox frame friend frog frost fruit funnel future game garage garden garlic
gate giant gift ginger glass glove goat gold grain grape grass gravel guitar hair hammer hand harbour harvest hat hawk
head heart heaven helmet hen herb hill history hockey home honey hook horn horse hospital hotel hour house hunter ice
idea insect iron island ivory jacket jail jam jar jewel joke journey judge juice jungle kettle key king kitchen kite
knee knife knot ladder lady lake lamp language lantern law lawyer leaf leather lemon letter library lid light lily
lion lip liquid list lizard lock lorry lunch machine magnet map marble market mask master match meadow meal meat medal
melon metal midnight milk mill mine minister minute mirror mist mixture model money monkey month moon morning mother
motor mountain mouse mouth movie museum music nail name napkin neck needle nest net night noise north nose notebook
number nurse nut oak ocean office oil olive onion orange orchard oven owl oxygen package page paint palace pan paper
parent park parrot partner party passenger path pattern pear pearl pen pencil pepper person petrol photo piano picture
pig pigeon pillow pilot pin pipe pirate planet plant plate pocket poem pool port post potato powder prince prison
prize profit pump pupil puppet queen quilt rabbit radio rail rain ranch ribbon rice rider ring river road robin rock
rocket roof room rope rose rubber rug ruler sail salad salt sand sauce school science screen screw sea season seat
secret seed shadow sheep shelf shell sheriff ship shirt shoe shop shore shoulder shower signal silk silver singer sink
sister skin sky sleeve smoke snail snake snow soap sock soil soldier song soup south spade spider spoon spring stable
stage stairs stamp star station steam steel stem stick stomach stone storm story stove stranger straw stream street
string student sugar suit summer sun supper surface sweater swimmer switch table tail tailor tank tape target taxi tea
teacher temple tennis tent theatre thread throat throne thumb thunder ticket tiger timber title toast tomato tongue
tool tooth torch towel tower town toy track tractor traffic train tray treasure tree tribe trip truck trumpet tub
tunnel turkey twig uncle uniform valley van vase vegetable velvet vessel village violin visitor voice volcano wagon
waist walk wall walnut warehouse watch water wave wax weather week whale wheat wheel whistle wife wind window wine
wing winter wire witness wolf woman wood wool word worker world worm yard yarn year zebra zipper
"""
WORDS = tuple(_LIST.split())
_FIFTH = 5


@dataclass(frozen=True)
class Written:
    """A word on a picture.

    Attributes:
        word: in lower case.
        colour: of its letters.
        row: of the grid.
        column: half a square is one; of the first letter.
    """

    word: str
    colour: str
    row: int
    column: int


def is_held_out(word: str) -> bool:
    """Whether training must not show it: a fifth of the words."""
    return derive_seed(0, "mini-VQA held-out words", word) % _FIFTH == 0


def random_word(random: Random, *, held_out: bool) -> Written:
    """Draw a picture of a word that is held out, or of one that is not."""
    word = random.choice([each for each in WORDS if is_held_out(each) is held_out])
    colour, row = random.choice(COLOURS), random.randrange(GRID)
    return Written(word, colour, row, random.randint(0, LETTERS - len(word)))


def word_questions(written: Written) -> list[Asked]:
    """Return what is asked about a word: to read it, and to spell it."""
    family = HELD_OUT if is_held_out(written.word) else SEEN
    return [
        Asked(family, "word/read", "What word is written here?", written.word),
        Asked(family, "word/spell", "Spell the word that is written here.", " ".join(written.word)),
    ]
