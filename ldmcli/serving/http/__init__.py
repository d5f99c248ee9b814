"""HTTP for other programs: OpenAI's and AUTOMATIC1111's calls as requests to this program. A request is hostile: it
names no path and no address, and what it may ask for is limited."""
