"""stub"""


async def tail(bench): ...
