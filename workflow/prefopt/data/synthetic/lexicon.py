"""The words of the embedded world: what its posts may say. Every list is lower-case common English."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """One subreddit: how a title names it, and the verbs (past tense), adjectives and objects of its events."""

    phrase: str
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    objects: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


RELATIONS = _words(
    """
    sister brother mother father cousin aunt uncle nephew niece grandmother grandfather stepfather stepmother husband
    wife boyfriend girlfriend fiance roommate neighbor boss coworker manager teacher student friend classmate teammate
    tutor coach dentist doctor nurse plumber gardener barber tailor client customer tenant godmother godfather
    babysitter mentor assistant intern
    """
)

NAMES = _words(
    """
    anna mark paul laura peter susan david emily james linda robert nancy john karen thomas lisa daniel betty george
    helen kevin sandra brian donna edward carol ronald ruth anthony sharon jason michelle jeffrey sarah ryan kimberly
    jacob deborah gary jessica nicholas shirley eric cynthia jonathan angela stephen melissa larry brenda justin amy
    scott rebecca brandon virginia benjamin kathleen samuel pamela gregory martha alexander debra patrick amanda
    jack stephanie dennis carolyn jerry christine tyler marie aaron janet jose catherine adam frances nathan
    christina henry samantha douglas julie zachary olivia kyle heather walter rachel harold alice carl diana
    arthur emma roger julia albert victoria joe lauren willie judith ralph megan roy andrea eugene hannah louis
    jacqueline philip teresa bobby gloria johnny sara bruce ann vincent madison martin monica oscar sophia felix
    clara hugo nina simon tina leo maria ivan elena omar fatima
    """
)

TOPICS: dict[str, Topic] = {
    "relationships": Topic(
        "love and trust",
        _words("hid burned forgot returned tore kept opened read wrote wore threw showed shared copied buried deleted"),
        _words("secret romantic private silver golden precious faded lovely tender sealed perfumed engraved"),
        _words(
            """
            letter ring diary necklace bracelet photo album poem bouquet perfume message locket dress watch earrings
            painting scarf gift pillow blanket postcard portrait candle mirror bathrobe invitation envelope keepsake
            teddy recording
            """
        ),
    ),
    "pets": Topic(
        "a pet",
        _words("fed bathed adopted chased scared trained walked released lost found rescued brushed petted spoiled"),
        _words("hungry sleepy furry playful lazy noisy tiny spotted wild shy gentle fluffy"),
        _words(
            """
            puppy kitten parrot hamster rabbit goldfish turtle lizard snake pony donkey goat lamb duck chicken rooster
            pigeon canary ferret mouse spider frog hedgehog poodle beagle terrier goose calf piglet peacock
            """
        ),
    ),
    "jobs": Topic(
        "work",
        _words("printed signed canceled approved rejected submitted ignored leaked edited filed shredded mailed"),
        _words("urgent annual monthly official final important detailed corporate legal confidential weekly digital"),
        _words(
            """
            report contract budget invoice proposal schedule resume payroll memo spreadsheet presentation audit survey
            brochure receipt badge laptop printer stapler folder agenda forecast complaint permit license ledger
            manual newsletter database website
            """
        ),
    ),
    "travel": Topic(
        "a trip",
        _words("packed booked missed changed upgraded dropped carried shipped left misplaced checked rented"),
        _words("foreign heavy cheap expensive leather tropical sturdy folded northern southern coastal waterproof"),
        _words(
            """
            suitcase passport ticket map camera backpack visa luggage hotel cabin cruise flight ferry tent compass
            guidebook souvenir voucher itinerary umbrella sunscreen canoe kayak hammock lantern binoculars yacht
            tram boat helmet
            """
        ),
    ),
    "cooking": Topic(
        "food",
        _words("cooked ate baked spilled tasted ruined served fried boiled grilled sliced froze seasoned stirred"),
        _words("spicy salty sweet sour frozen fresh creamy crispy rotten bitter buttery smoked"),
        _words(
            """
            soup cake bread salad steak pasta pizza curry pie omelet pancake sandwich stew lasagna pudding cheese
            sausage salmon turkey roast dumpling burrito casserole muffin waffle brownie risotto meatball chili cookie
            """
        ),
    ),
    "school": Topic(
        "school",
        _words("failed passed finished graded borrowed memorized translated skipped solved presented revised stole"),
        _words("difficult boring optional advanced scientific historical tricky yearly written oral practical weird"),
        _words(
            """
            homework essay exam textbook project quiz notebook calculator pencil blackboard thesis lecture diploma
            chart globe microscope poster script uniform locker syllabus dictionary ruler eraser trophy certificate
            yearbook experiment worksheet flashcard
            """
        ),
    ),
    "cars": Topic(
        "a car",
        _words("drove crashed parked scratched washed repaired towed bought traded painted dented polished sold"),
        _words("rusty fast electric vintage dusty shiny black yellow red blue broken used"),
        _words(
            """
            truck van sedan motorcycle scooter jeep bus convertible minivan tractor bumper engine windshield tire
            radiator battery muffler pickup limousine taxi trailer headlight dashboard gearbox camper wagon hatchback
            ambulance fender brake
            """
        ),
    ),
    "neighbors": Topic(
        "the street",
        _words("broke moved cut climbed removed trimmed blocked knocked watered planted kicked built fixed smashed"),
        _words("wooden tall old green giant crooked metal narrow muddy stone concrete plastic"),
        _words(
            """
            fence hedge tree mailbox gate shed ladder grill lawnmower bench fountain birdhouse guitar drum trumpet
            piano bicycle skateboard trampoline swing statue flowerpot hose shovel wheelbarrow doorbell antenna chimney
            porch driveway
            """
        ),
    ),
}

PLACES = _words(
    """
    wedding airport library museum restaurant stadium hospital church beach market office bakery gym theater cinema
    park zoo pool playground cafe bank court courthouse harbor station supermarket pharmacy garage farm barn castle
    palace bridge lake river island forest valley mountain campsite festival concert parade funeral birthday picnic
    barbecue reunion graduation conference meeting auction workshop warehouse factory laboratory clinic salon laundry
    nightclub bar brewery vineyard orchard greenhouse garden aquarium circus carnival fair casino arcade mall
    bookstore kiosk embassy monastery temple mosque synagogue chapel cemetery monument square plaza marina pier
    lighthouse terminal subway checkpoint border motel hostel inn resort spa sauna rink racetrack velodrome arena
    kindergarten college university academy dormitory cafeteria canteen basement attic rooftop balcony
    """
)

DAYS = _words("monday tuesday wednesday thursday friday saturday sunday christmas easter halloween thanksgiving")

REASONS = _words(
    """
    noise rain storm snow heat cold wind fog flood drought earthquake smoke fire smell mold dirt dust trash money debt
    rent tax price bill loan mortgage inheritance divorce breakup jealousy anger hate pride greed envy boredom stress
    hunger thirst fatigue insomnia illness fever flu headache allergy injury surgery pregnancy baby twins gossip rumor
    lie joke prank bet dare argument fight insult threat mistake accident misunderstanding delay deadline traffic
    detour strike layoff promotion bonus raise transfer merger lawsuit inspection eviction renovation construction
    blackout outage leak virus hacker scam theft burglary alarm siren phone internet television radio computer
    election politics religion diet alcohol coffee sugar hangover party visitor stranger dog cat insects ants bees
    rats squirrels bear raccoon weeds pollen shortage crowd queue rule law
    """
)

FEELINGS = _words(
    """
    ashamed proud angry sad happy guilty nervous anxious lonely jealous confused relieved tired bored scared afraid
    upset furious hopeful hopeless grateful calm betrayed hurt worried embarrassed surprised shocked disgusted
    disappointed excited depressed frustrated exhausted helpless useless stupid foolish brave curious desperate numb
    empty lost bitter cheerful content cautious defeated delighted doubtful eager envious fearful fortunate free
    gloomy homesick horrible humble ignored impatient insecure insulted irritated joyful lucky mad miserable
    misunderstood offended optimistic overwhelmed panicked peaceful pessimistic puzzled regretful rejected resentful
    restless satisfied shaken sick skeptical sorry suspicious terrible terrified thankful threatened touched trapped
    uneasy unhappy unwanted vulnerable weak weary worthless
    """
)

QUESTION_VERBS = _words(
    """
    call ask tell pay thank sue forgive avoid warn visit invite contact email confront blame trust hire fire report
    help meet follow ignore block question consult notify reward punish text bribe remind interview challenge
    defend support believe accept join
    """
)

QUESTION_OBJECTS = _words(
    """
    landlord police lawyer judge principal mayor priest rabbi therapist counselor accountant electrician mechanic
    carpenter janitor owner seller buyer agent broker banker insurer sheriff detective firefighter veterinarian
    breeder groomer pilot driver captain chef waiter baker butcher farmer florist jeweler librarian professor dean
    parents family children grandparents inlaws bride groom bridesmaid witness council senator governor journalist
    editor publisher photographer musician singer actor dancer painter sculptor designer architect engineer programmer
    scientist chemist surgeon psychologist paramedic pharmacist optician midwife caretaker doorman receptionist
    secretary supervisor director president chairman investor recruiter consultant translator interpreter courier
    postman sailor soldier guard ranger lifeguard referee umpire trainer gymnast
    """
)
