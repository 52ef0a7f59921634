"""What leaves a search? The checkpoint that every search ends with, and the forms that `raymask export` makes of it."""
