"""The small world that example rows and the base model's pretraining text talk about."""

NAMES = (
    "Ada Ana Ben Carl Cleo Dana Eli Emma Finn Gus Hana Ida Ivan Jane Jon Kai Kim Lea Leo Lily Lucas Mara Max Mia Nina "
    "Noah Nora Olga Omar Pia Raj Rosa Sam Sara Tara Theo Tom Uma Vera Will Yara Zoe"
).split()

# Singular and plural.
ITEMS = {
    "apple": "apples", "ball": "balls", "bean": "beans", "book": "books", "bottle": "bottles", "brick": "bricks",
    "button": "buttons", "cake": "cakes", "candle": "candles", "card": "cards", "carrot": "carrots", "coin": "coins",
    "cookie": "cookies", "cup": "cups", "egg": "eggs", "flower": "flowers", "fork": "forks", "hat": "hats",
    "key": "keys", "kite": "kites", "lamp": "lamps", "leaf": "leaves", "lemon": "lemons", "map": "maps",
    "marble": "marbles", "melon": "melons", "nail": "nails", "nut": "nuts", "onion": "onions", "orange": "oranges",
    "peach": "peaches", "pear": "pears", "pen": "pens", "pencil": "pencils", "plate": "plates", "plum": "plums",
    "ring": "rings", "rope": "ropes", "rose": "roses", "seed": "seeds", "shell": "shells", "shirt": "shirts",
    "spoon": "spoons", "stamp": "stamps", "star": "stars", "sticker": "stickers", "stone": "stones",
    "ticket": "tickets", "toy": "toys", "tulip": "tulips",
}  # fmt: skip

CONTAINERS = {
    "bag": "bags", "basket": "baskets", "bowl": "bowls", "box": "boxes", "crate": "crates", "drawer": "drawers",
    "jar": "jars", "pack": "packs", "shelf": "shelves", "tray": "trays",
}  # fmt: skip

GROUPS = ("children", "friends", "cousins", "players", "students", "neighbors", "teams", "guests")
PLACES = ("lake", "market", "school", "station", "library", "farm", "beach", "park", "museum", "village")
FIELDS = ("garden", "field", "room", "yard", "hall", "pool", "carpet", "wall")

OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "fast": "slow", "light": "heavy", "early": "late", "old": "new",
    "full": "empty", "hard": "soft", "wet": "dry", "loud": "quiet", "clean": "dirty", "open": "closed",
    "near": "far", "high": "low", "happy": "sad", "strong": "weak", "thick": "thin", "rich": "poor", "deep": "shallow",
    "left": "right", "first": "last", "up": "down", "day": "night", "wide": "narrow", "rough": "smooth",
}  # fmt: skip

COLORS = {
    "grass": "green", "snow": "white", "coal": "black", "the clear sky": "blue", "a ripe banana": "yellow",
    "a ripe tomato": "red", "an orange": "orange", "a crow": "black", "milk": "white", "a lime": "green",
    "a plum": "purple", "a flamingo": "pink", "chocolate": "brown", "an elephant": "gray", "a fire truck": "red",
    "a lemon": "yellow", "a frog": "green", "a bear": "brown", "salt": "white", "a violet": "purple",
}  # fmt: skip

ANIMALS = {
    "bee": ("hive", "buzzes"), "bird": ("nest", "sings"), "dog": ("kennel", "barks"), "horse": ("stable", "neighs"),
    "cow": ("barn", "moos"), "pig": ("sty", "grunts"), "lion": ("den", "roars"), "owl": ("hollow tree", "hoots"),
    "duck": ("pond", "quacks"), "sheep": ("pen", "bleats"), "frog": ("pond", "croaks"), "wolf": ("den", "howls"),
    "mouse": ("hole", "squeaks"), "hen": ("coop", "clucks"), "cat": ("house", "meows"), "rabbit": ("burrow", "thumps"),
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana",
    "India": "Delhi", "Iran": "Tehran", "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Finland": "Helsinki", "Ghana": "Accra",
}  # fmt: skip

KINDS = {
    "fruits": ("apples", "pears", "plums", "lemons", "peaches", "melons"),
    "animals": ("dogs", "cows", "owls", "frogs", "wolves", "horses"),
    "tools": ("hammers", "saws", "drills", "ladders", "brushes", "shovels"),
    "drinks": ("water", "tea", "milk", "juice", "coffee", "cocoa"),
    "vegetables": ("carrots", "onions", "beans", "peas", "leeks", "beets"),
    "colors": ("red", "blue", "green", "yellow", "purple", "orange"),
    "instruments": ("drums", "flutes", "violins", "pianos", "harps", "horns"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January February March April May June July August September October November December"
).split()  # fmt: skip
HOBBIES = ("chess", "painting", "swimming", "cooking", "running", "reading", "singing", "fishing", "dancing", "hiking")
CITIES = tuple(CAPITALS.values())
