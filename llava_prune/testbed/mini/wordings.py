"""How mini asks: wordings to train with, and others that are kept for a test."""

from ..questions import ALL_WORDINGS

_MORE = {
    "color_at": ("Which color does row {}, column {} have?", "Name the color in row {}, column {}."),
    "shape_at": ("Which shape does row {}, column {} have?", "Name the shape in row {}, column {}."),
    "shape_of": ("Which shape is {}?", "Name the shape that is {}."),
    "color_of": ("Which color is the {}?", "Name the color of the {}."),
    "exists": ("Is any {0} {1}?", "Does the picture show a {1} {0}?"),
    "count_shape": ("What is the number of {}s?", "How many {}s do you see?"),
    "count_color": ("What is the number of {} shapes?", "How many {} shapes do you see?"),
    "word_at": ("Which word is in row {}, column {}?", "Name the word in row {}, column {}."),
    "word_row": ("In what row is the word {}?", "Name the row of the word {}."),
    "word_column": ("In what column is the word {}?", "Name the column of the word {}."),
}
TRAINED = {kind: (*asked, *_MORE[kind]) for kind, asked in ALL_WORDINGS.items()}
HELD_OUT = {
    "color_at": ("Look at row {}, column {}. Its color?", "Tell me the color at row {} and column {}."),
    "shape_at": ("Look at row {}, column {}. Its shape?", "Tell me the shape at row {} and column {}."),
    "shape_of": ("Something is {}. What shape does it have?", "Tell me what shape the {} thing has."),
    "color_of": ("There is one {}. What color does it have?", "Tell me what color the {} has."),
    "exists": ("Can you find a {1} {0}?", "Would you say there is a {1} {0}?"),
    "count_shape": ("Tell me how many {}s there are.", "I would like to know the number of {}s."),
    "count_color": ("Tell me how many shapes are {}.", "I would like to know the number of {} shapes."),
    "word_at": ("Look at row {}, column {}. Its word?", "Tell me the word at row {} and column {}."),
    "word_row": ("Find the word {}. Which row is it in?", "Tell me the row that has the word {}."),
    "word_column": ("Find the word {}. Which column is it in?", "Tell me the column that has the word {}."),
}
