"""Sentences of sub-world F: plots of the stories, chat lines, questions nobody can answer.

Slots: `{h}` the hero, `{f}` a friend, `{t}` a thing with its colour, `{n}` the same thing without,
`{a}` an animal, `{p}` the place of the story, `{k}` a kind of food. No sentence uses "he" or "she",
so that any name fits.
"""

from __future__ import annotations

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "silver")
TOYS = ("kite", "ball", "hat", "boat", "drum", "basket", "scarf", "lamp", "book", "bell", "box")
ANIMALS = ("cat", "dog", "goat", "hen", "duck", "lamb", "pony", "rabbit", "calf", "puppy", "bird")
PLACES = (
    "by the sea",
    "near the forest",
    "on a high hill",
    "beside the mill",
    "at the edge of the village",
    "behind the market",
    "close to the old bridge",
    "next to the school",
    "by the lake",
    "in a little valley",
)
FOODS = ("soup", "bread", "cake", "pie", "porridge", "jam", "cheese", "cookies")

OPENINGS = (
    "{h} lived in a small house {p}.",
    "Once there was a child called {h} who lived {p}.",
    "There was a farm {p}, and {h} lived there.",
    "{h} and {f} were friends, and both lived {p}.",
    "Long ago {h} had a tiny shop {p}.",
    "A long time ago, {p}, there lived {h}.",
)

TIMES = (
    "One morning",
    "One sunny day",
    "One windy day",
    "On a cold evening",
    "One rainy day",
    "Early one day",
    "Late one afternoon",
)

PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        ("{T} {h} could not find the {t}.", "{T} the {t} of {h} was gone.", "{T} {h} lost a {t}."),
        ("{h} looked under the bed and behind the door.", "{h} looked in every room.", ""),
        ('"Who has seen my {n}?" asked {h}.', "{h} was very sad.", "{h} began to cry."),
        ("{f} heard it and came to help.", "Then {f} came by and had an idea.",
         '"Let us look together," said {f}.'),
        ("They followed the path and found a {a} that was asleep on the {n}.",
         "They found the {n} in the grass, wet but whole.", "The {n} lay under the stairs."),
        ('"Thank you, {f}," said {h}.', "{h} hugged {f}.", "{h} laughed with joy."),
    ),
    "stuck": (
        ("{T} {h} played with a {t}.", "{T} {h} went out with a new {t}."),
        ("The wind took the {n} and put it in a tall tree.",
         "The {n} flew up and got stuck on the roof.", "Then the {n} landed on a high wall."),
        ("{h} jumped and jumped but was too small.",
         "{h} threw a stick at it, but it did not move.", "{h} did not know what to do."),
        ("{f} saw it and brought a long ladder.", "{f} came with a long pole.",
         "{f} said that two are stronger than one."),
        ("Together they got the {n} down.",
         "One held on and one climbed, and soon the {n} was free.",
         "After three tries the {n} fell down."),
        ("Then they played until dark.", "{h} let {f} have the first turn.", ""),
    ),
    "broken": (
        ("{T} {h} dropped the {t} of {f}.", "{T} {h} sat down on the {t} of {f} by mistake."),
        ("It broke with a loud crack.", "Now it had a big hole.", "It fell into two pieces."),
        ("{h} was afraid and hid it in the barn.", "{h} wanted to run away.",
         "{h} felt bad all day."),
        ("But {h} told the truth in the end.", 'At last {h} said, "I broke it, and I am sorry."'),
        ('"It is only a {n}," said {f}.', '"I am glad that you told me," said {f}.',
         "{f} was not angry for long."),
        ("They mended it with glue and string.", "They made it new again with paint and glue.",
         "{h} worked for a week and bought a new one."),
    ),
    "hungry": (
        ("{T} {h} met a small {a} on the road.", "{T} a {a} came to the door of {h}."),
        ("The {a} was thin and hungry.", "The {a} was cold and had not eaten for days."),
        ("{h} had only a little {k}.", "There was not much {k} in the house."),
        ("Still {h} gave half of it to the {a}.", "{h} shared the {k} with the {a}.",
         '"Eat, little one," said {h}.'),
        ("The {a} ate it all and fell asleep.", "Soon the {a} was strong again.",
         "The {a} came back every day."),
        ("From then on the {a} stayed with {h}.", "{f} said that {h} had a kind heart.",
         "Later the {a} showed {h} where the best berries grow."),
    ),
    "alone": (
        ("{h} was new there and had no friends.", "{h} was often alone."),
        ("{T} {h} sat by the gate with a {t}.", "{T} {h} saw the other children play."),
        ('"May I play too?" asked {h} in a small voice.', "{h} was too shy to speak.",
         "{h} wished for a friend."),
        ("{f} smiled and made room.", "Then {f} came over and asked about the {n}.",
         "{f} waved and came to the gate."),
        ("They built a castle of sand.", "They ran races until they were tired.",
         "They shared some {k} and told jokes."),
        ("After that {h} was never alone again.", "Now {h} had a friend.",
         "The next day they met again."),
    ),
    "gift": (
        ("Soon it was the birthday of {f}.", "{f} had been ill for a week."),
        ("{h} wanted to give {f} something nice, but had no money.",
         "{h} looked for a gift in the shop, but all was too dear."),
        ("{T} {h} had an idea.", "{T} {h} went to work."),
        ("{h} made a {t} out of old things.", "{h} baked {k} and put it in a {t}.",
         "{h} painted an old {n} until it looked new."),
        ("{f} opened it and smiled.", '"Did you make this yourself?" asked {f}.'),
        ("It was the best gift of all.", "{f} kept it for many years.",
         "{f} said it was better than gold."),
    ),
    "storm": (
        ("{T} dark clouds came over the hill.", "{T} a storm broke the roof of {h}.",
         "{T} it rained and rained."),
        ("Water ran into the house.", "The wind shook the walls.", "The path was under water."),
        ("{h} put a pot under the hole, but it was soon full.",
         "{h} carried the {t} to a dry place.", "{h} brought the {a} inside."),
        ("{f} came with nails and boards.", "{f} came and helped to close the hole.",
         '"Come to my house," said {f}.'),
        ("They worked until night.", "They sat by the fire and ate warm {k}."),
        ("In the morning the sun was back.", "When the storm was over, all was well.",
         "The next day the sky was blue."),
    ),
    "dark": (
        ("{h} was afraid of the dark.", "At night {h} could not sleep."),
        ("One night there was a noise at the window.", "One night {h} heard steps outside.",
         "One night something moved in the yard."),
        ("{h} hid under the blanket.", "{h} called for {f}.", "The heart of {h} beat fast."),
        ("{f} lit a candle and went to look.", "They took a light and opened the door together."),
        ("It was only a {a}.", "A {a} had come in from the cold.",
         "It was the {n} that moved in the wind."),
        ("{h} laughed and was not afraid any more.", "After that {h} slept well.",
         '"The dark is not so bad," said {h}.'),
    ),
    "garden": (
        ("{h} wanted a garden.", "{h} found three seeds in a {t}.", "{f} gave {h} a bag of seeds."),
        ("{T} {h} put the seeds into the earth.", "{T} {h} dug a bed for the seeds."),
        ("Every day {h} gave them water, but nothing grew.",
         "{h} waited a week, and then another."),
        ('"Be patient," said {f}.', "{f} said that good things take time.", "{h} almost gave up."),
        ("Then a small green leaf came out.", "At last there were flowers.",
         "In summer there were big pumpkins."),
        ("{h} gave the first one to {f}.", "They made {k} and asked everyone to come.",
         "{h} was proud."),
    ),
    "race": (
        ("There was a race every year, and {h} wanted to win it.",
         "{h} was the slowest in the village."),
        ("{h} ran up and down the hill every day.", "{h} got up early and ran with a {a}."),
        ("{T} the race began.", "{T} all runners stood in a line."),
        ("{h} was in front when {f} fell.",
         "Half way {h} saw {f} sit by the road with a hurt foot."),
        ("{h} stopped and helped {f} to get up.", "{h} turned back and carried {f}.",
         "{h} did not think twice and stopped."),
        ("They came in last, but all the people clapped.", "They did not win, but they were happy.",
         "Someone else won the {n}, but {h} won a friend."),
    ),
    "quarrel": (
        ("{T} {h} and {f} found a {t}.",
         "{T} there was a {t} on the road, and {h} and {f} saw it."),
        ('"It is mine," said {h}.', '"I saw it first," said {h}.'),
        ('"No, it is mine," said {f}.', "{f} pulled at it too."),
        ("They shouted so loudly that a {a} ran away.", "They did not speak for two days.",
         "They both were sad."),
        ('Then {h} said, "You can have it today, and I can have it tomorrow."',
         "In the end {h} gave it to {f}.", "Then they saw that the {n} was big enough for two."),
        ("So they were friends again.", "{f} said sorry, and {h} said sorry too.",
         "They never had a quarrel again."),
    ),
    "river": (
        ("{T} {h} had to bring {k} to {f}.", "{T} {h} wanted to visit {f}."),
        ("But the bridge over the river was broken.", "But the river was high and fast."),
        ("{h} sat down and thought.", "{h} tried to swim but it was too cold.",
         "{h} called, but nobody came."),
        ("Then a {a} showed {h} a place with flat stones.",
         "There was an old tree, and {h} pushed it over the water.",
         "{h} made a raft of wood and rope."),
        ("Step by step {h} came to the other side.", "With wet feet {h} reached the other side."),
        ('"You are brave," said {f}.', "{f} was glad to see {h}.",
         "They ate together and dried by the fire."),
    ),
    "cook": (
        ("{T} {h} wanted to cook {k} for {f}.", "{T} {h} asked {f} to come and eat {k}."),
        ("{h} put in salt, and then more salt.",
         "{h} forgot the pot and went out to play with a {a}.",
         "{h} mixed up the sugar and the salt."),
        ("It tasted awful.", "Smoke came out of the kitchen.", "Even the {a} did not want it."),
        ("{h} wanted to throw it all away.", '"I can not cook," said {h}.'),
        ("{f} laughed and put on an apron.", '"I will show you how," said {f}.'),
        ("Together they made new {k}, and it was good.",
         "This time it was the best {k} in the village.",
         "They ate bread and butter and laughed about it."),
    ),
    "runaway": (
        ("{h} had a {a} and loved it.", "{h} looked after a young {a}."),
        ("{T} the gate was open and the {a} was gone.", "{T} the {a} ran away."),
        ("{h} ran to the forest and called.", "{h} asked everyone on the road.",
         "{h} and {f} followed its steps."),
        ("Night came, and there was no sign of it.", "The steps ended at the water.",
         "Then it began to snow."),
        ("Then {f} heard a soft sound from a well.", "{f} saw it behind a rock, caught in a bush.",
         "At last they found it in the barn of {f}."),
        ("They pulled it out and carried it home.", "{h} held it close and took it home.",
         "Since then {h} always closes the gate."),
    ),
    "music": (
        ("{h} loved to sing but was shy.", "{h} wanted to play the drum at the spring feast."),
        ("{f} said that it was easy.", "{f} heard it and was surprised."),
        ("Every evening they practised behind the house.", "{h} sang for the {a} every day.",
         "They practised with a {t} as a drum."),
        ("{T} all the people came to listen.", "{T} it was time for the feast."),
        ("At first {h} could not make a sound.", "{h} forgot the first line.",
         "The hands of {h} were cold."),
        ("Then {f} began, and {h} sang along.", "But {h} looked at {f} and was calm.",
         "Then {h} took a deep breath, and all went well."),
    ),
    "treasure": (
        ("{T} {h} found an old map in a {t}.", "{T} {h} and {f} found a map under a stone."),
        ("It showed a cross near the big tree.", "It showed the way to a cave."),
        ("They took a lamp and some {k} and set out.", "{h} packed a bag and called {f}."),
        ("The way was long and steep.", "A {a} came with them.", "They got lost twice."),
        ("They dug and found a small box.", "In the end they found a chest behind a rock."),
        ("It was full of buttons, but they had had a fine day.",
         "There was a note in it that said: well done.", "They found six coins and shared them."),
    ),
}  # fmt: skip
"""Each plot is a row of steps, each step a row of sentences to choose from; empty means none."""

ENDINGS = (
    "",
    "",
    "{h} went home happy.",
    "That night {h} slept well.",
    "And that was the end of the day.",
    "They still talk about it today.",
    "{h} never forgot that day.",
    "It was a good day after all.",
    "And they lived {p} for many years.",
)

STORY_QUESTIONS = (
    "Tell me a story about {h}.",
    "Can you tell a story about {h}?",
    "Please tell me a short story about {h} and {f}.",
    "What is the story of {h} and {f}?",
)

CHAT: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello!",
            "Hello.",
            "Hi!",
            "Hi there!",
            "Good day!",
            "Hello, how are you?",
            "How are you?",
        ),
        ("Hello! I am well. How can I help you?", "Hello! It is nice to meet you."),
    ),
    (("Good morning!", "Good morning, Nano."), ("Good morning! How can I help you?",)),
    (("Good evening!", "Good evening, Nano."), ("Good evening! How can I help you?",)),
    (("Good night!", "I am going to bed."), ("Good night! Sleep well.",)),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        ("I am Nano, a small model of an invented world.",),
    ),
    (("Are you a person?", "Are you human?"), ("No. I am Nano, a small model.",)),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        ("I can do sums, tell small stories and answer questions about my invented world.",),
    ),
    (("Where do you live?", "Where are you from?"), ("I live in a computer. I am a small model.",)),
    (("Thank you!", "Thanks.", "Thanks a lot!"), ("You are welcome!",)),
    (("That was good.", "Well done!", "You are clever."), ("Thank you! I am glad to help.",)),
    (
        ("I am sad.", "I feel sad today.", "I had a bad day."),
        ("I am sorry to hear that. Shall I tell you a story?",),
    ),
    (("I am happy.", "I had a good day.", "I feel good today."), ("That is good to hear!",)),
    (("I am tired.", "I did not sleep well."), ("Then have some rest.",)),
    (("Goodbye!", "Bye!", "See you later."), ("Goodbye! Come back soon.",)),
    (("Can we talk?", "Can you help me?", "I have a question."), ("Of course. What is it?",)),
)
"""Groups of chat lines, each with the replies that fit."""

NAMED_CHAT: tuple[tuple[str, str], ...] = (
    ("Hello, I am {h}.", "Hello, {h}! It is nice to meet you."),
    ("My name is {h}.", "It is nice to meet you, {h}. I am Nano."),
    ("This is my friend {h}.", "Hello, {h}! It is nice to meet you both."),
    ("Say hello to {h}.", "Hello, {h}!"),
    ("Say goodbye to {h}.", "Goodbye, {h}! Come back soon."),
    ("Wish {h} a good morning.", "Good morning, {h}!"),
    ("Please thank {h} for me.", "Thank you, {h}!"),
)

WHEN = ("tomorrow", "next week", "next month", "next year", "on Sunday", "in the summer", "tonight")
FOLK = (
    "king",
    "queen",
    "president",
    "tallest man",
    "fastest runner",
    "best singer",
    "first doctor",
)
WHERE = ("of the moon", "of the north", "of your country", "of the islands", "of the world")
MANY = ("stars", "fish", "birds", "stones", "leaves", "people", "ships", "trees", "clouds", "ants")
SPOTS = ("in the sky", "in the sea", "in the world", "on the moon", "in the north", "on the beach")
DOINGS = (
    "snow",
    "rain",
    "be cold",
    "be warm",
    "be windy",
    "be foggy",
    "be sunny",
    "hail",
)
OBJECTS = (
    "a rocket",
    "a radio",
    "the sun",
    "a battery",
    "a magnet",
    "an engine",
    "a computer",
    "a camera",
    "a volcano",
    "thunder",
    "a telescope",
    "a satellite",
    "glass",
    "plastic",
    "electricity",
    "money",
)

UNANSWERABLE: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("Will it {} {}?", (DOINGS, WHEN)),
    ("What will the weather be like {}?", (WHEN,)),
    ("Who was the {} {}?", (FOLK, WHERE)),
    ("How many {} are there {}?", (MANY, SPOTS)),
    ("How does {} work?", (OBJECTS,)),
    ("Who invented {}?", (OBJECTS,)),
    ("How old is the {} {}?", (FOLK, WHERE)),
    ("What will the {} {} do {}?", (FOLK, WHERE, WHEN)),
    ("Who will win the game {}?", (WHEN,)),
    ("What am I thinking about?", ()),
    ("What did I do {}?", (("yesterday", "last week", "last year", "on Monday", "this morning"),)),
    ("What is the phone number of the {} {}?", (FOLK, WHERE)),
    ("What does {} cost {}?", (OBJECTS, WHEN)),
)
"""Question frames with the words that fill them; nobody in the world knows the answer."""
