"""The words and names that questions are made of, where BBH's format leaves them free."""

from __future__ import annotations

_WORDS = """
abandon abbey abrasive absolute accordant accordion acorn acrobat adamant adjacent aerobatic affix agate airport
airworthy algebra alibi almanac aloft alphabet alpine amber amble amphibian antelope appendix apricot aquarium arbor
archipelago armchair arrow artichoke ash aspen asteroid atlas attendant attic autumn avalanche avocado backstage
bagpipe balcony ballast ballerina bamboo banquet barley barn barometer basil basilica bassoon bay beekeeper bellows
beneath benevolent berry bicentennial bicycle birch biscuit blackboard blanket blossom blueprint bluff bonfire
bookbinder boomerang boulder brigade broomstick buckle buffalo buttercup cabin cadence calendar calligraphy calorie
camel can't candle canoe canteen cantilever canvas canyon caravan cardigan carnival carp carpenter carpentry
cartographer cascade castle catamaran cathedral cavern cedar celebrate cello centipede ceramics chalice chandelier
channel chariot cheerful chestnut chimney chorus chronicle cinnamon circuit circumference citadel clarinet clarity
cloudburst clover coastline cobble comet comfortable commodore companion compass composer compost concentric concert
concerto condense condor conduct confetti conifer conservatory consonant constellation continent contour convection
coordinate coral cornflower corridor cotton couldn't counter courier cranberry crescent crimson crocodile crossroads
crystal cub cubic cucumber cupboard curriculum daffodil dagger dairy dapper daylight decorate decoy defiant delicate
delta denim diagram dialect diary dictionary didn't dignified dogwood dolphin dormant dragonfly driftwood drizzle
dumpling dune dungeon dwindle eager earthquake easel echo eclipse eggshell elbow electrician elegant elephant elk
ember embroidery encyclopedia engine envoy epoch equator escalator ethic evaporate evergreen evident excavation fabric
falcon fathom feather fern ferry fig fingerprint fireplace flamingo flannel flora flute foliage forecast formation
fountain foxglove fragile freckle frigate frost furnace gable gale gallop gardener garland gatekeeper gazelle gem
gemstone geography ginger gingerbread glacier goldfinch gondola gopher granite grapefruit graphite gusto gymnastics
hammock handkerchief harvest hatchet haystack haze hazel headlight hemisphere heron hickory hillside hinge honeycomb
horizon horseshoe humid hydrogen icebreaker igloo illuminate imaginary inkwell inlet instrument insulate interlude
isle isosceles ivory ivy jar jasmine jellyfish jigsaw journalist jovial juniper kangaroo kayak keel kelp keyboard
kingfisher kiosk knapsack laboratory lacquer landscape lantern larch lattice laurel lavender lemonade lemur lichen
lighthouse lilac limestone lobster locket locksmith longitude loom luminous lyric magnet magnolia magpie mahogany
mallet mammoth mandolin mango maple marathon marble marigold marsh mechanical mercury meteorite microscope migration
milestone mistake mitten molecule mosaic moss muffin mural mushroom mustard myth narrate navigator newt nightingale
nocturne nomad notebook notwithstanding oak oasis oatmeal obelisk observatory octagonal octave olive onyx opera orbit
orchard orchestra ornament otter overcast overcoat overture owl oxygen paddle palindrome parachute parade paragraph
parallel parsley particle pasture pebble pelican peninsula percussion perimeter periscope pewter phantom photograph
picnic pigment pilgrim pillow pineapple piston platinum plaza plumage polka polynomial pond poplar porcelain porcupine
postpone prairie prism procession propeller prospector prudent pumpkin quadrant quaver quicksand quilt quotation
raincoat ramble raspberry ravine recital reconcile reconnoiter rectangle reed reflection refraction regatta relic
reservoir rhinoceros rhododendron ribbon rosemary rustic rye saddle saffron sage salamander sandal sandpiper sandstone
satchel saxophone scaffold scarlet schooner sculptor seashore semicircle she's shelter shipwright silhouette skillet
slender snowflake solstice sorrel sparrow speedometer spindle spinnaker staircase stalactite starfish steamboat
steeple stencil stucco submarine sunflower symphony syrup tadpole tambourine tangent tapestry telescope temperate
terrace thermometer thicket thimble thistle thoughtful thunder toffee topaz torrent tortoise transparent trapezoid
trellis triangle trowel tulip tundra turpentine tusk twilight typewriter umber umbrella uncanny underneath undulate
unicorn urban utensil vandal vanguard vault velocity ventilate veranda verdict vibration vine vinegar volcanic voyage
warehouse watercolor waterfall waterproof weathervane wharf wheelbarrow whirlpool whisper wick wicker wilderness
windmill woodpecker workmanship wouldn't wreath xylophone yak yarn yesterday zealous zebra zinc zipper
"""

_NAMES = """
Abner Adela Alonzo Althea Anselm Beatriz Benita Bertram Blythe Calvin Carmela Cedric Clotilde Cosmo Dagmar Delphine
Desmond Edwina Elias Esperanza Ferdinand Flora Gideon Greta Hollis Ignacio Imelda Isidore Jocelyn Kaspar Lavinia
Leopold Lucinda Malcolm Marcella Nadine Nestor Odette Orville Paloma Percival Quentin Ramona Roderick Selma Silvio
Tabitha Ulrich Vivienne Wendell
"""

_PEOPLE = """
Aaron Alan Amanda Angela Barbara Brian Carol Catherine Charles Daniel Deborah Diana Edward Eric Frank Gary George
Helen Joseph Karen Kevin Laura Martin Olivia Patricia Paul Peter Rachel Robert Sandra
"""

WORDS = tuple(_WORDS.split())  # to be sorted: many begin alike, and an apostrophe stands before any letter
NAMES = tuple(_NAMES.split())  # for chains of who says what about whom
PEOPLE = tuple(_PEOPLE.split())  # for people seen through the day
