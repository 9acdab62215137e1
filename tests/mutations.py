r"""Hostile and broken answers: what the fuzz tests of test_verify.py grade.

mutated(rng, cases) draws one. Tables are of answers parted by @; a nest's ? is what it is put around.
"""


def table(block):
    """The parts of a block, parted by @ or by lines; blanks inside count."""
    lines = block.strip("\n").split("\n")
    return [part for line in lines for part in line.split(" @ ")]


STRUCTURED = r"""
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] @ \begin{vmatrix}1&x\\3&4\end{vmatrix}
\begin{pmatrix}1&2\end{pmatrix}^T @ \frac12\begin{bmatrix}1\\[4pt]2\end{bmatrix}
\left|\begin{matrix}1&2\\3&4\end{matrix}\right| @ 3\hat{i}-\hat{j} @ \det A=3
\mathbb{R}\setminus\{-1,2\} @ ]2,5[ @ [0,5[\cup]6,\infty[ @ \{x\in\mathbb{R}:x\ne-1\} @ |x-1|<3 @ |x|\ge 2
x<-2\text{ or }x>2 @ x>2\text{ and }x\le 5 @ x\ne 1,2 @ [0,1]\cup[1,2] @ \{1,2,2\} @ \{2,4,\ldots\}
(2;5) @ 0<f(x)<3 @ 3:5 @ 2\text{ to }3 @ 1:2:3 @ AB:CD=3:4 @ 2^{10}=1024 @ m+n=5+8=13 @ \sin^2x+\cos^2x=1
P(A\cap B)=\frac16 @ x\equiv3\pmod 5 @ 1101_{\text{two}} @ (3A)_{16} @ 3{:}30\text{ p.m.}
\frac{dy}{dx}=2x @ f^{-1}(x)=\frac{x-3}2 @ \text{The answer is }7 @ 1.5\text{ million}
5\text{ m}^3/\text{s} @ \textbf{(B)}\ 7 @ \text{DNE} @ 84\text{ ways} @ 9^{\text{th}}
\frac{\pi}{4}\approx0.785 @ 0.\dot{3} @ 0.1\overline{6} @ 6.02E23 @ 2\operatorname{cis}60^\circ
\overline{1+i} @ \lfloor\pi\rfloor @ x=3,y=-1 @ (x,y,z)=(1,2,3) @ (x,y)=(1,2),(x,y)=(2,1)
\begin{cases}x,&x>0\\0,&x\le0\end{cases} @ \{{3,5\}} @ {{90^\circ}} @ e^(2x) @ 2**(1/3) @ \frac 5 8
{52 \choose 5} @ \binom{n}{2} @ \,58,500 @ \mathbf{\frac{1}{2}} @ \begin{aligned}x&=7\end{aligned}
"""
NESTS = r"""
{?} @ \left(?\right) @ \overline{?} @ \boxed{?} @ \frac{?}{2} @ \sqrt{?} @ \text{?} @ \mathbf{?} @ |?|
\lfloor ?\rfloor  @ (?)! @ \begin{pmatrix}?\end{pmatrix} @ \{?\} @ \left|?\right| @ -(?) @ ]?[ @ 2^{?}
\binom{?}{2} @ (?)^9 @ \sin(?) @ (x+?)^2 @ \begin{vmatrix}?&1\\2&3\end{vmatrix} @ \log_{?}2 @ (1,?)
\text{The answer is }?= @ \{x:?<x\} @ \mathbb{R}\setminus\{?\}
"""
LINKS = r"""
\cup(0,1) @ \approx 1 @ =1 @ x< @ 1: @ 1, @ ; @ \\ @ & @ ! @ ' @ ^2 @ _1 @ \, @ \text{a} @ \pm  @ x\ne  @ 5
\dots, @ \binom{9}{4} @ 10^ @ | @ \mathbb{R}\setminus @ \text{ and } @  or  @ \hat{i}+ @ \pmod 7 @ E9
\overline{1} @ ^\circ @ \text{ cm} @ \{1\}, @ \begin{matrix} @ (1,2), @ x=1, @ \frac12 @ - @ 1  @ .3
\dot{3} @ \to  @ <
"""
GIANTS = r"""
9^{9^{9^9}} @ (10^{9})! @ \binom{10^9}{5000} @ \binom{99999}{49999} @ 2^{-10^9} @ ((99!)!)!
\sqrt[10^9]{2} @ 10^{10^9}:10^{10^8} @ x^{10^9} @ (x+y+1)^{999} @ (1+i)^{10^9} @ 1E999999999
10^{9^9}\pmod{7} @ zz9_{36} @ 12_{10^9} @ \lfloor 10^{500}\pi\rfloor @ 99999!! @ 0^{-9}
-9^{9^9}\approx 3 @ \log_{10^9}9^{9^9} @ \frac{1}{10^{10^9}} @ \sum_{k=1}^{10^9}\frac1k @ \sin(10^{10^9})
|x|<9^{9^9} @ [0,9^{9^9}] @ 9^{9^9}\text{ million} @ f(9^{9^9})=9^{9^9} @ \{9^{9^9},10^{9^9}\} @ 9^{9^9}\%
9^{9^9}=9^{9^9} @ (1.0000001)^{10^{12}} @ e^{e^{e^{e^9}}}
"""
STRUCTURED, NESTS, LINKS, GIANTS = (table(block) for block in (STRUCTURED, NESTS, LINKS, GIANTS))
NOISE = list("{}\\^()9,!_x/[]|&;:=<")


def structured(rng):
    return rng.choice(STRUCTURED)


def nested(rng):
    """One answer in many brackets, environments or functions, of one or of several kinds."""
    text = rng.choice(["1", "x", "1,2", rng.choice(STRUCTURED)])
    kinds = rng.sample(NESTS, rng.choice([1, 1, 2, 4]))
    for _ in range(rng.choice([1, 2, 3, 10, 100])):
        text = rng.choice(kinds).replace("?", text)
    return text


def chained(rng):
    """A piece, or two, many times."""
    pieces = rng.sample(LINKS, rng.choice([1, 1, 2]))
    return "".join(pieces) * rng.choice([2, 3, 10, 100, 1000]) + rng.choice(["1", "x", "", "}"])


def matrix(rng):
    """Of up to 40 x 40 entries, in any brackets, times a number, to a power or transposed."""
    rows, columns = rng.choice([1, 2, 3, 12, 40]), rng.choice([1, 2, 3, 12, 40])
    entries = rng.choice([["1", "0", "-2"], ["x", "1", r"\frac12"], ["9^9", "10!"], ["a", "b", "c"]])
    body = r"\\".join("&".join(rng.choice(entries) for _ in range(columns)) for _ in range(rows))
    kind = rng.choice(["pmatrix", "bmatrix", "vmatrix", "matrix", "smallmatrix", "cases", "array"])
    text = rf"\begin{{{kind}}}{'{c}' if kind == 'array' else ''}{body}\end{{{kind}}}"
    return rng.choice(["", "", r"\frac13", "-", "x"]) + text + rng.choice(["", "", "^T", "^{99}", "^{-1}"])


def giant(rng):
    """Numbers that no machine holds, alone and in what holds numbers."""
    a, b = rng.choices([*GIANTS, "1", "x"], k=2)
    column = rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}"
    return rng.choice([a, a, f"-{a}", f"{a},{b}", f"({a},{b})", rf"\frac{{{a}}}{{{b}}}", column, f"{a}={b}",
                       f"{a}:{b}", f"{a}+{b}", rf"{a}\text{{ cm}}", rf"\sqrt{{{a}}}"])


def noise(rng):
    return rng.randbytes(rng.randrange(60)).decode("latin-1")


KINDS = {noise: 20, structured: 25, nested: 10, chained: 8, matrix: 6, giant: 6}  # of a hundred; else a case


def mutated(rng, cases):
    """(gold, response) of cases (gold, response ..): a box around an answer of a kind above or of the cases,
    most with a few characters changed; sometimes the box is broken too. The gold is a case's, one of
    STRUCTURED, or what the answer was before."""
    [kind] = rng.choices([*KINDS, None], [*KINDS.values(), 100 - sum(KINDS.values())])
    original = kind(rng) if kind else rng.choice(cases)[1][7:-1][:300]
    text = list(original)
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randrange(2)] = [rng.choice(NOISE)]
    text = "".join(text)
    gold = rng.choice([rng.choice(cases)[0], structured(rng), original])
    return gold, rf"\boxed{{{text}}}" if rng.random() < 0.8 else rf"\boxed{{{text}"
