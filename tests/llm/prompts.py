"""Real prompts of many kinds: questions, chats, prose, code, lists, numbers, other languages. The
last eight begin with the same long text."""

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

QUESTIONS = [
    "The capital of France is",
    CHAT.format("What is the capital of France?"),
    CHAT.format("Why is the sky blue? Answer in two sentences."),
    CHAT.format("Who wrote Pride and Prejudice, and in which year did it come out?"),
    CHAT.format("How do I boil an egg so that the yolk stays soft?"),
    "Q: How many legs does a spider have?\nA:",
]

PROSE = [
    "The rain had not stopped for three days, and the river at the end of the garden",
    "Once upon a time, in a village at the edge of a dark forest, there lived a clockmaker who",
    "Photosynthesis is the process by which green plants turn light into chemical energy. In its "
    "first stage, chlorophyll absorbs",
    "Dear Ms. Johnson,\n\nThank you for your letter of 3 May. I am writing to tell you that",
]

CODE = [
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics",',
    "<ul>\n  <li>Apples</li>\n  <li>",
]

LISTS = [
    "Three primary colours:\n1. Red\n2.",
    "Shopping list:\n- milk\n- eggs\n- bread\n-",
    "Monday, Tuesday, Wednesday,",
    "2, 4, 8, 16, 32,",
    "| Country | Capital |\n|---|---|\n| Italy | Rome |\n| Spain |",
]

LANGUAGES = [
    "La capitale de la France est",
    "Der schnelle braune Fuchs springt über",
    "El perro corre por el parque y",
    "日本の首都は",
]

GUIDE = (
    "You are the guide of a small museum of science in an old observatory. The ground floor shows "
    "clocks, compasses and sextants; the first floor shows telescopes, from Galileo's lenses to a "
    "mirror of half a metre; the dome holds a refractor of 1892 that still works. Visitors come "
    "from everywhere and most of them are curious children. Answer each question kindly, in plain "
    "words, and in no more than three sentences. If you do not know, say so.\n\nVisitor: "
)

SHARED = [
    GUIDE + question + "\nGuide:"
    for question in (
        "What can I see on the ground floor?",
        "Why is the mirror curved?",
        "How old is the big telescope in the dome?",
        "What is a sextant for?",
        "Can I look at the Sun through a telescope?",
        "Who was Galileo?",
        "Is there a café here?",
        "Why do stars twinkle, and planets not?",
    )
]

PROMPTS = QUESTIONS + PROSE + CODE + LISTS + LANGUAGES + SHARED
