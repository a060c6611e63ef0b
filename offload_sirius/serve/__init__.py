"""A loaded model behind HTTP, in the words of OpenAI's API, and a page to talk to it. Knows no weights and no terminals."""
