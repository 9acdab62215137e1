r"""What is right and what is wrong, and why: the tables test_verify.py goes through.

MATH: reason -> lines "gold | answer in the box" for right ones and for wrong ones. LETTERS, CODE: see there.
"""

# -- math ----------------------------------------------------------------------------------------------------

MATH = {
    "the same number, written otherwise": (r"""
        5 | 5
        5 | 5.
        5 | 5.0
        5 | +5
        5 | (5)
        5 | {5}
        5 | $5$
        5 | \(5\)
        5 | \text{5}
        -5 | −5
        25 | 025
        0 | -0
        2 | 2.00
        0.1 | \frac{1}{10}
        \frac{1}{2} | 0.5
        \frac{1}{2} | .5
        \frac{1}{2} | 1/2
        \frac{1}{2} | ½
        \frac{1}{2} | \frac{2}{4}
        \frac12 | \dfrac{1}{2}
        \frac1{72} | \tfrac{1}{72}
        -\frac{1}{2} | \frac{-1}{2}
        -\frac{3}{4} | \frac{3}{-4}
        -\frac34 | -0.75
        10^{3} | 1000
        1.2\times10^{3} | 1200
        6.02\times 10^{23} | 6.02 \cdot 10^{23}
        6.02\times 10^{23} | 6.02e23
        0.\overline{3} | \frac13
        0.1\overline{6} | \frac16
        1267650600228229401496703205376 | 2^{100}
        """, r"""
        5 | -5
        5 | 6
        5 | 55
        12 | 1 2
        -5 | 5
        204 | 203
        10^{3} | 10^{4}
        0.\overline{3} | 0.3
        1 | 1.0000001
        \frac12 | \frac21
        """),
    "thousands: a comma, a thin space, a brace; a decimal comma is none": (r"""
        1000 | 1,000
        1000 | 1{,}000
        1000 | 1\,000
        1000 | 1\!000
        10000 | 10 000
        10000 | 10\ 000
        1,000 | 1000
        1000 | (1,000)
        1,234,567 | 1234567
        1000.5 | \$1,000.50
        12345 | 12{,}345
        (10,100) | (10, 100)
        100, 200 | 100,200
        """, r"""
        1.5 | 1,5
        1000 | 1,00
        1000 | 1.000
        (1,234) | 1234
        1234 | (1,234)
        100, 200 | 100200
        """),
    "a decimal is what it says: rounding is not equality": (r"""
        0.5 | \frac12
        3.14 | \frac{157}{50}
        0.125 | \frac18
        """, r"""
        \frac{1}{3} | 0.33
        \frac{1}{3} | 0.333333
        \frac{1}{3} | 0.3333333333333333
        \sqrt{2} | 1.414
        \sqrt{2} | 1.4142135623730951
        2\pi | 6.28
        3.14 | \pi
        3.14 | \frac{22}{7}
        0.33 | \frac13
        0.333... | \frac13
        0.49 | 0.5
        """),
    "a mixed number is a sum, not its fraction part nor a product": (r"""
        1\frac{1}{2} | \frac{3}{2}
        1\frac12 | 1.5
        \frac{5}{3} | 1\frac{2}{3}
        \frac{5}{3} | 1 2/3
        -1\frac{1}{2} | -1.5
        \frac{22}{7} | 3\frac{1}{7}
        2\frac{1}{2}\text{ hours} | 2.5
        """, r"""
        \frac{1}{2} | 1\frac{1}{2}
        1\frac{1}{2} | \frac{1}{2}
        \frac{2}{3} | 1\frac{2}{3}
        -1\frac12 | -\frac12
        1 | 2\frac12
        """),
    "units, percent, degree and currency are left out when the number agrees": (r"""
        5 | 5\text{ cm}
        5 | 5 cm
        5 | 5\ \mathrm{cm}
        5 | 5~\text{cm}^2
        5 | 5\,\mathrm{cm}^{2}
        5\text{ cm}^2 | 5
        5 | 5 \text{ apples}
        5\text{ apples} | 5
        5 \text{ red apples} | 5 \text{ red apples}
        5 \text{ red apples} | 5
        12 | 12 \text{ square units}
        12 | 12 square units
        20 | 20 \text{ dollars}
        20 | \text{20 dollars}
        16 | 16\text{ s}
        9.8 | 9.8 \, \text{m/s}^2
        9.8 | 9.8\ m/s^2
        5 \text{ m/s} | 5\ \frac{\text{m}}{\text{s}}
        60 | 60 \text{ km/h}
        60 | 60 miles per hour
        \$5 | 5
        5 | \$5.00
        50 | 50\%
        50\% | 50
        50\% | 50\%
        50\% | 0.5
        0.5 | 50\%
        \frac{9}{10} | 90\%
        45 | 45^{\circ}
        45^\circ | 45
        45 | 45°
        90^\circ | 90 \text{ degrees}
        10 \text{ cm} | 10 \text{ m}
        \frac{1}{2}\text{ hour} | \frac12
        3\sqrt{2}\text{ cm} | \sqrt{18}
        36\sqrt{3} | 36 \sqrt{3} \text{ cm}^2
        5x | 5x \text{ cm}
        100 | 100^{\circ}C
        """, r"""
        3mg | 3
        3 | 3m
        16 | 16 s
        2n | 2
        2 n | 2
        n \text{ is even} | n
        5 | 6\text{ cm}
        5 | 5 \text{ million}
        5 | 5 million
        5 | 5 thousand
        5 | 5 \text{ dozen}
        5 | 5 \text{ hundreds}
        5 | 5 \text{ or more}
        5 | 5 \text{ less}
        5 | 5 \text{ to } 6
        5 | 5 \text{ and a half}
        5 | \text{about } 5
        5 | 5 \text{ is wrong}
        5 | 5x
        5 | 5y
        12 | 12 \text{ square feet and more}
        50 | 0.5
        0.5 | 50
        50\% | 5\%
        \frac{\pi}{4} | 45^\circ
        """),
    "words that follow a number do not make it right": (r"""
        """, r"""
        5 | 5 or something else
        5 | 5 \text{ or something else}
        5 | something else or 5
        5 | \text{5 or something else}
        5 | 5, \text{ I think}
        5 | 5 \text{ or } 6
        5 | 5 or 6
        5 | 5 \text{ or }
        5 | or 5
        5 | \text{not } 5
        5 | 5 \neq 5
        5 | 5!
        5 | 5?6
        5 | 5 \ldots
        5 | any number
        7 | \text{seven}
        """),
    "bare lists and sets are unordered, of equal length": (r"""
        1,2 | 2,1
        1, 2, 3 | 3, 1, 2
        1, 2, 3 | 1, 2 \text{ and } 3
        1, 2, 3 | 1, 2, \text{ and } 3
        6 \text{ and } 10 | 10, 6
        1, -1 | -1 \text{ or } 1
        1, -1 | 1 or -1
        1;2 | 2;1
        \{1,2\} | \{2,1\}
        \left\{1,2\right\} | \lbrace 1, 2 \rbrace
        \{1,2\} | 1,2
        1,2 | \{2,1\}
        \frac{3}{2}, -1 | -1, 1.5
        \sqrt{2}, 3 | 3, \sqrt2
        (0,1),(1,0) | (1,0),(0,1)
        \{(1,2),(3,4)\} | (3,4), (1,2)
        \text{(A), (C)} | \text{(C), (A)}
        A, C | C, A
        \{5\} | 5
        """, r"""
        1,2 | 1
        1 | 1,2
        1,2 | 1,3
        1,2 | 1,2,3
        1,2,3 | 1,2
        1,1,2 | 1,2,2
        1,2 | (1,2)
        \{1,2\} | (1,2)
        \{1,2\} | [1,2]
        (0,1),(1,0) | (0,1),(0,1)
        12 | 1,2
        """),
    "two roots: plus and minus, x =": (r"""
        2,-2 | \pm 2
        2,-2 | ±2
        \pm 2 | -2, 2
        x=\pm2 | 2, -2
        x = 1 \text{ or } x = -1 | \pm 1
        x=1, x=-1 | 1, -1
        1\pm\sqrt{2} | 1+\sqrt2, 1-\sqrt2
        1+\sqrt2, 1-\sqrt2 | x = 1 \pm \sqrt{2}
        \frac{-1\pm\sqrt5}{2} | \frac{-1-\sqrt5}{2}, \frac{-1+\sqrt5}{2}
        3, 5 | x \in \{3, 5\}
        3, 5 | x = 3, 5
        3, 5 | S = \{3, 5\}
        """, r"""
        \pm 2 | 2
        2 | \pm 2
        1, -1 | x=1
        x = 1 \text{ or } x = -1 | x = 1
        1\pm\sqrt{2} | 1+\sqrt2
        1\pm\sqrt{2} | 1\pm\sqrt{3}
        """),
    "what stands in parentheses is ordered": (r"""
        (1,2) | (1,2)
        (1,2) | \left( 1, 2 \right)
        (1,2) | (1.0, \frac{4}{2})
        (\frac{1}{2},3) | (0.5,3)
        (x,y) = (1,2) | (1,2)
        \langle 1,2,3\rangle | \left\langle 1,2,3 \right\rangle
        (1, -1, \sqrt{4}) | (1,-1,2)
        """, r"""
        (1,2) | (2,1)
        (1,2) | 1,2
        (3,4) | 3,4
        (1,2) | (1,2,3)
        (1,2) | (1,3)
        (1,2) | \{1,2\}
        (1,2,3) | \langle 1,2,3\rangle
        """),
    "intervals: the brackets count; an inequality in one name is an interval": (r"""
        [1,2) | [1,2)
        [1,2) | 1\le x<2
        1\le x<2 | [1,2)
        [0,1] | 0\leq x\leq 1
        [0,1] | 1\geq x\geq 0
        x>3 | (3,\infty)
        x>3 | (3,∞)
        x>3 | (3,+\infty)
        (3,\infty) | 3<x
        x \geq 5 | x\ge5
        x \le \frac12 | (-\infty, 0.5]
        x > \pi | (\pi, \infty)
        x \in [1,2] | [1,2]
        \{x \mid x > 3\} | (3, \infty)
        x<1 \text{ or } x>3 | (-\infty,1)\cup(3,\infty)
        (-\infty,1)\cup(3,\infty) | x>3 \text{ or } x<1
        \left(-\infty, -2\right] \cup \left[2, \infty\right) | [2,\infty) \cup (-\infty,-2]
        \left(-\infty, -2\right] \cup \left[2, \infty\right) | x \le -2 \text{ or } x \ge 2
        (-\infty,0)\cup(0,\infty) | (-\infty,0) U (0,\infty)
        \mathbb{R} | (-\infty,\infty)
        \mathbb{R} | \text{all real numbers}
        x \in \mathbb{R} | \mathbb{R}
        """, r"""
        (1,2) | [1,2)
        (1,2] | (1,2)
        [1,2] | (1,2)
        [0,1] | [1,0]
        (0,1) | 0\leq x\leq 1
        x\geq 5 | x>5
        x\geq 5 | x \le 5
        x\geq 5 | y \ge 5
        x\geq 5 | 5
        (-2, 3) | (-2,3]
        \left(-\infty, -2\right) \cup \left[2, \infty\right) | (-\infty,-2]\cup[2,\infty)
        (-\infty,1)\cup(3,\infty) | (-\infty,1)
        (-\infty,1)\cup(3,\infty) | (-\infty,1),(3,\infty)
        """),
    "infinity and the empty set": (r"""
        \infty | ∞
        \infty | +\infty
        -\infty | -∞
        \emptyset | \varnothing
        \emptyset | ∅
        \emptyset | \{\}
        """, r"""
        \infty | -\infty
        \emptyset | 0
        \emptyset | \{0\}
        0 | \emptyset
        """),
    "matrices, entry by entry": (r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} \frac22 \\ 2.0 \end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \left(\begin{array}{c} 1 \\ 2 \end{array}\right)
        """, r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
        """),
    "an equation for one name is its value, under that name": (r"""
        x=5 | 5
        5 | x=5
        5 | 5=x
        x=5 | 5 = x
        5 | x = 10/2 = 5
        5 | 2+3=5
        5 | \text{Area} = 5
        5 | f(2)=5
        30 | \angle ABC = 30^\circ
        x=-3 | -3
        f(x)=x^2 | x^2
        x^2 | f(x)=x^2
        y=2x+3 | 2x+3
        y=2x+3 | y = 3+2x
        x=1,y=2 | y=2, x=1
        a=2, b=3 | b=3, a=2
        """, r"""
        x=5 | y=5
        x=5 | x=6
        5 | 2+2=5
        5 | x = 4 = 5
        5 | 6=x
        x=5 | 5=y
        5 | 5 = 6
        a=2, b=3 | a=3, b=2
        """),
    "equations are equal up to a factor": (r"""
        2x+3y=6 | 4x+6y=12
        y = \frac{1}{2}x + 3 | 2y = x + 6
        x^2+y^2=4 | y^2+x^2-4=0
        y=2x+3 | 2x - y + 3 = 0
        """, r"""
        2x+3y=6 | 4x+6y=13
        x^2+y^2=4 | x^2+y^2=2
        y=2x+3 | y=2x-3
        """),
    "scalars that are equal wherever they are defined": (r"""
        2\sqrt{3} | \sqrt{12}
        \frac{\sqrt{2}}{2} | \frac{1}{\sqrt 2}
        \frac{1+\sqrt{5}}{2} | \frac{\sqrt5+1}{2}
        \sqrt[3]{8} | 2
        \sqrt[3]{2} | 2^{1/3}
        √12 | 2\sqrt3
        sqrt(12) | 2\sqrt3
        120 | 5!
        120 | \binom{10}{3}
        1024 | 2^{10}
        \frac18 | 2^{-3}
        3 | \log_2 8
        3 | \log_{10} 1000
        \sin 30^\circ | \frac12
        \cos\frac{\pi}{3} | \frac12
        2 | \lfloor 2.5 \rfloor
        2 \pi | 2π
        k\pi | \pi k
        x^2-1 | (x-1)(x+1)
        (x+1)^2 | x^2+2x+1
        n^2+n | n(n+1)
        x^{2}+2x | x²+2x
        \frac{x+1}{2} | \frac{1}{2}x+\frac12
        0.5x | \frac{x}{2}
        \frac{1}{x} | x^{-1}
        \frac{x}{2y} | x/(2y)
        \frac{a+b}{c} | (a+b)/c
        e^{2x} | (e^x)^2
        e^{2x} | \exp(2x)
        \tan x | \frac{\sin x}{\cos x}
        \sqrt{x^2} | |x|
        \pi(R^2-r^2) | \pi(R-r)(R+r)
        \frac{mv^2}{r} | \frac{m v^{2}}{r}
        \frac{\pi}{2}+k\pi | \frac{(2k+1)\pi}{2}
        \sin^2 x+\cos^2 x | 1
        x_1+x_2 | x_2+x_1
        \alpha+\beta | β+α
        3(x+1) | 3x+3
        \sqrt{a}\sqrt{b} | \sqrt{ab}
        \ln a+\ln b | \ln(ab)
        2^{n+1} | 2\cdot 2^n
        \binom{n}{2} | \frac{n(n-1)}{2}
        \frac{(n+1)!}{n!} | n+1
        1-\cos x | 2\sin^2\frac{x}{2}
        2(3) | 6
        """, r"""
        x(x+1) | x^2+x+1
        2\sqrt{3} | 3\sqrt{2}
        \sqrt{x^2} | x
        \pi(R^2-r^2) | 0
        R | r
        n | m
        p - q | q - p
        2^{10} | 2^{11}
        \frac{x}{2y} | x/2+y
        1 | x^0y
        x_1+x_2 | 2x
        2(3) | 5
        \ln(ab) | \ln a+\ln b
        2^{n+1} | 4^n
        2x | 2x + 10^{-9}
        \lfloor\log_{2} n\rfloor+1 | 1
        \lfloor\sqrt{n-1}\rfloor | 0
        x+1 | x+2
        """),
    "complex numbers": (r"""
        3+4i | 4i+3
        -1 | e^{i\pi}
        -i | 1/i
        -i | \frac{1}{i}
        -1 | i^2
        2i | \sqrt{-4}
        \sqrt{5}i | i\sqrt{5}
        """, r"""
        3+4i | 3-4i
        i | -i
        """),
    "words are compared as words, case aside": (r"""
        \text{Monday} | Monday
        \text{even} | \text{Even}
        \text{Yes} | yes
        \text{(B)} | B
        B | \text{(B)}
        \text{B} | \textbf{B}
        A | \mathrm{A}
        \text{no solution} | \text{No solution}
        \text{3:00 PM} | 3:00 \text{ PM}
        11:30 | 11:30
        2:3 | 2 : 3
        12_{5} | 12_5
        """, r"""
        \text{east} | \text{seat}
        \text{No} | Yes
        A | B
        B | b
        even | odd
        2:3 | 3:2
        12_5 | 12
        12_5 | 12_6
        """),
    "what is true everywhere is equal to itself only": (r"""
        \cos 2x = 1-2\sin^2 x | \cos(2x) = 1 - 2\sin^2(x)
        \cos 2x = 1-2\sin^2 x | \cos 2x = 1-2 \sin^{2} x
        \log_2 32=5 | 5
        \log_2 32=5 | \log_2(32) = 5
        """, r"""
        \cos 2x = 1-2\sin^2 x | 0=0
        \cos 2x = 1-2\sin^2 x | x=x
        \cos 2x = 1-2\sin^2 x | x=1
        \cos 2x = 1-2\sin^2 x | \cos 2x=\cos 2x
        \cos 2x = 1-2\sin^2 x | \sin 2x=2\sin x\cos x
        \log_2 32=5 | \log_2 8=3
        \log_2 32=5 | 1=1
        \log_2 32=5 | 5=5=6
        x+x=2x | y=y
        """),
    "matrices in every bracket, with factors, transposed; determinants": (r"""
        \left[\begin{array}{cc}1&0\\0&1\end{array}\right] | \begin{pmatrix}1&0\\0&1\end{pmatrix}
        \begin{pmatrix}1&0\\0&4\end{pmatrix} | \left[\begin{matrix}1&0\\0&4.0\end{matrix}\right]
        \begin{pmatrix}1&0\\0&4\end{pmatrix} | \begin{bmatrix}1&0\\[4pt]0&4\end{bmatrix}
        \begin{pmatrix}1&0\\0&4\end{pmatrix} | \left(\begin{smallmatrix}1&0\\0&4\end{smallmatrix}\right)
        \begin{pmatrix}1\\4\end{pmatrix} | (1,4)^T
        \begin{pmatrix}1\\4\end{pmatrix} | \begin{bmatrix}1&4\end{bmatrix}^{\top}
        \begin{pmatrix}k\\2k\end{pmatrix} | k\begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}-1\\-2\end{pmatrix} | -\begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}\frac{1}{3}\\1\end{pmatrix} | \frac13\left[\begin{array}{r}1\\3\end{array}\right]
        \begin{pmatrix}1&0\\0&4\end{pmatrix} | \begin{pmatrix}1&0\cr 0&4\cr\end{pmatrix}
        \begin{vmatrix}1&2\\3&4\end{vmatrix} | \left|\begin{array}{cc}1&2\\3&4\end{array}\right|
        1 | \det\begin{pmatrix}1&0\\0&1\end{pmatrix}
        6 | \begin{vmatrix}2&0\\0&3\end{vmatrix}
        """, r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \left\{\begin{matrix}1&2\\3&4\end{matrix}\right\}
        \begin{pmatrix}1&0\\0&1\end{pmatrix} | \left[\begin{array}{cc}1&0\\1&0\end{array}\right]
        \begin{pmatrix}1\\4\end{pmatrix} | (1,4,)^T
        \begin{pmatrix}1\\4\end{pmatrix} | (4,1)^T
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}^T
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \frac12\begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | -2
        6 | \begin{vmatrix}2&0\\1&2\end{vmatrix}
        """),
    "functions given by cases, systems, aligned lines": (r"""
        \begin{cases} x & x>0 \\ 1 & x<0\end{cases} | \begin{cases} 1, & \text{if } x<0 \\ x, & x>0\end{cases}
        f(x)=\begin{cases} x & x>0 \\ 0 & x<0\end{cases} | f(x)=\begin{cases} x, & x>0 \\ 0, & x<0\end{cases}
        2 | \begin{aligned} x &= 1+1 \\ &= 2\end{aligned}
        x=1, y=2 | \begin{cases} x=1 \\ y=2 \end{cases}
        """, r"""
        \begin{cases} x & x>0 \\ -x & x\le 0\end{cases} | \begin{cases} -x & x> 0 \\ x & x\le 0\end{cases}
        """),
    "an exact value and its decimal": (r"""
        \frac{\pi}{4} | \frac{\pi}{4} \approx 0.785
        \frac{\sqrt{3}}{2} | \frac{\sqrt{3}}{2}\approx0.866
        2.35 | x \approx 2.35
        \sqrt{2} | x = \sqrt{2} \approx 1.41
        0.785 | \frac{\pi}{4} \approx 0.785
        """, r"""
        \sqrt{2} | \sqrt{2} \approx 1.732
        \sqrt{2} | \approx 1.414
        \sqrt{2} | x \approx 1.414
        \frac{\pi}{3} | \frac{\pi}{4} \approx 0.785
        2 | 1.99 \approx 2
        """),
    "letters are no units, nor are words that make another number of it": (r"""
        5000000 | 5\text{ million}
        3.5\text{ million} | 3,500,000
        60 | 5\text{ dozen}
        \frac32 | 3\text{ halves}
        16\text{ s} | 16s
        9.8\text{ m/s}^2 | 9.8m/s^2
        """, r"""
        3 | 3k
        3 | n=3k
        2 | 2a
        \frac32 | \frac32 a
        (2,3) | (2a,3a)
        x>2 | x>2n
        1000 | 10^{3}n
        0 | 0n
        3 | 3N
        3 | 3\text{k}
        3 | 3\text{ ninths}
        3 | 3\text{ millionths}
        5 | 5\text{ lakhs}
        5 | 5\text{ myriads}
        5 | 5\text{ scores}
        5 | 5\text{ googols}
        5 | 5\text{ squared}
        5 | 5\text{ tens}
        5 | 5\text{ million ways}
        5 | 5\text{ half hours}
        3.5\text{ million} | 3.5
        3.5\text{ million} | 350000
        """),
    "units of every kind": (r"""
        84 | 84\text{ different ways}
        5 | 5\text{ distinct values}
        4 | 4\text{ ordered pairs}
        6 | 6\text{ years old}
        5 | 5\text{ cm each}
        5 | 5^{\text{th}}
        5 | 5\text{th}
        1 | 1^{st}
        45 | 45\deg
        45 | 45º
        5 | 5\,\Omega
        5 | 5\,\mu\text{m}
        5 | 5\,\mathrm{m}\,\mathrm{s}^{-1}
        5 | 5\,\mathrm{m\,s^{-1}}
        5 | 5\text{ m}^3/\text{s}
        5 | 5\,\mathrm{kg \cdot m/s}
        5 | 5\text{ N·m}
        5 | 5¢
        5 | ₹5
        7 | \text{The length is }7\text{ cm}
        0.35 | 35 percent
        0.35 | 35\text{ percent}
        10 | 10''
        12 | 12\text{ cm}^2
        12 | 12\,\mathrm{cm}^2
        5 | 5\text{ V}
        120 | 120^\circ \text{C}
        3\sqrt2 | 3\sqrt{2}\text{ units}
        """, r"""
        84 | 84\text{ to }90\text{ ways}
        5 | 5\text{ more ways}
        5 | 6^{\text{th}}
        35 | 3.5\text{ percent}
        5 | 5\text{ or so}
        """),
    "a number in words or with a label": (r"""
        7 | \text{The answer is } 7
        7 | \text{The answer is 7}
        7 | \text{Answer: } 7
        7 | \text{Therefore, } 7
        \text{no solution} | \text{The answer is } no solution
        \text{Yes} | \text{The answer is Yes}
        ab+b | \text{Answer: } ab+b
        """, r"""
        7 | \text{The answer is not } 7
        \text{Yes} | \text{The answer is not Yes}
        \text{Yes} | \text{The answer is no}
        7 | \text{The answer is about } 7
        7 | \text{The answer is } 8
        7 | \text{at least } 7
        """),
    "an option's letter with its value": (r"""
        7 | \textbf{(B)}\ 7
        B | \textbf{(B)}\ 7
        \textbf{(B)}\ 7 | 7
        \textbf{(B)}\ 7 | B
        \frac{\pi}{2} | \text{(E)}\ \frac{\pi}{2}
        -7 | \mathrm{(C)}\ -7
        """, r"""
        B | \textbf{(C)}\ 7
        7 | \textbf{(B)}\ 8
        \textbf{(B)}\ 7 | \textbf{(C)}\ 7
        A | (A)(C)
        A | (A) \text{ and } (C)
        """),
    "fonts, sizes and braces show nothing": (r"""
        7 | {{7}}
        3,5,7 | {{3, 5, 7}}
        90^\circ | {{90^\circ}}
        \frac{14}{3} | \mathbf{\frac{14}{3}}
        -5 | \mathbf{-5}
        -t^2-t-3 | \mathbf{-t^2 - t - 3}
        I,II,IV | \mathbf{I,II,IV}
        90^\circ | \mathbf{90^\circ}
        7 | {\tt 7}
        7 | \Large{7}
        7 | \underline{7}
        7 | \mathsf{7}
        7 | \texttt{7}
        7 | \textcolor{red}{7}
        3\mathbf{i}-\mathbf{j} | 3\hat{i}-\hat{j}
        3\mathbf i-\mathbf j | 3\vec{i}-\vec{j}
        \mathbb{R} | \mathbf{R}
        """, r"""
        7 | {{8}}
        """),
    "ratios": (r"""
        3:5 | 6:10
        3:5 | \frac35
        3:5 | 3\text{ to }5
        1:2:3 | 2:4:6
        AB:CD=3:4 | 3:4
        """, r"""
        3:5 | 5:3
        2:1 | 2\text{ million}
        5:1 | 5\text{ twelfths}
        3:30\text{ PM} | \frac{1}{10}
        3:5 | \frac53
        1:2:3 | 1:3:2
        \frac{3}{5} | 3:5
        """),
    "sets of reals are equal as sets": (r"""
        (2,5) | (2;5)
        [2;5) | [2,5[
        \mathbb{R} | \text{all reals}
        (-\infty,-1)\cup(-1,\infty) | \mathbb{R}\setminus\{-1\}
        (2,5) | x>2 \text{ and } x<5
        (-3,3) | |x|<3
        |x-1|\le 2 | [-1,3]
        (-\infty,-3)\cup(3,\infty) | |x|>3
        [0,2] | [0,1]\cup[1,2]
        x<2 | x-2<0
        x<2 | -x>-2
        x<2 | 2x<4
        (0,3) | 0<f(x)<3
        x\ne 4 | x != 4
        [2,\infty) | x \in [2, +\infty[
        (-\infty,2]\cup[3,\infty) | ]-\infty,2] \cup [3,+\infty[
        """, r"""
        2 | \neq 2
        (2,5) | x>2 \text{ or } x<5
        (2,5) | x\ge2 \text{ and } x<5
        (-\infty,-1)\cup(-1,\infty) | \mathbb{R}\setminus\{1\}
        (-\infty,-1)\cup(-1,\infty) | \mathbb{R}
        (-3,3) | |x|\le 3
        (-3,3) | |x|>3
        [0,2] | [0,1)\cup(1,2]
        [0,2] | [0,1]\cup[1,3]
        x<2 | -x<-2
        x<2 | 2x<2
        ]2,5[ | [2,5]
        (1,2) | y\in[1,2)
        \infty | -\text{infinity}
        2 | \ne 2
        """),
    "named components, several solutions": (r"""
        (2,5),(5,2) | (2,5)or(5,2)
        (a,b,c)=(1,2,3) | b=2, a=1, c=3
        (3,-1) | y=-1, x=3
        (1,2),(2,1) | x=1,y=2 \text{ or } x=2,y=1
        \{1,2\} | \{x : x=1 \text{ or } x=2\}
        x=1,y=2 | (x,y)=(1,2)
        (2;5) | (2,5)
        """, r"""
        (a,b,c)=(1,2,3) | a=1,b=3,c=2
        (3,-1) | x=-1, y=3
        (3,-1) | m=3, b=-1
        x=3, y=-1 | -1, 3
        x=3, y=-1 | (-1, 3)
        (1,2),(2,1) | x=1,y=2
        (2,5),(5,2) | (2,5)or(5,3)
        (1,3),(2,4) | (1,4)
        (a,b)=(1,2) | (x,y)=(1,2)
        (a,b)=(1,2) | \{1,2\}
        x=1, y=2 | \{1,2\}
        a=2, b=3 | 2 \text{ or } 3
        (2;5) | (5;2)
        (2;5) | 5, 2
        1,2 | (1,2)
        """),
    "sets count no item twice": (r"""
        \{1,2\} | \{1,2,2\}
        1,1,2 | \{1,1,2\}
        """, r"""
        \{1,2\} | \{1,1\}
        \{1,2,3\} | \{1,2,2\}
        1,1,2 | 1,2,2
        """),
    "a quantity's name and its value": (r"""
        7 | P(X=3) = 7
        25 | |AB|^2=25
        \frac12 | \lim_{x\to0}\frac{1-\cos x}{x^2} = \frac{1}{2}
        x^2+C | \int 2x\,dx = x^2+C
        \frac{AB}{CD}=\frac{2}{5} | \frac25
        \frac25 | \frac{AB}{CD}=\frac{2}{5}
        |AB|=7 | 7
        \sin A=\frac12 | \frac12
        \frac12 | \sin A=\frac12
        f(x)=2x+1 | f(t)=2t+1
        7 | m+n = 7
        5 | x+y = 5
        7 | 2n+1 = 2(3)+1 = 7
        """, r"""
        7 | a+b+c=8
        7 | 7+1=7
        7 | 3x+1=7
        9 | x^2=9
        36 | 4x^2+9y^2=36
        3 | (x-1)^2+(y+2)^2=3
        7 | 2+2=7
        0 | 5x-7y+4 = 0
        0^\circ | 2x+3y-z=0
        1 | \frac{x^2}{2}-\frac{y^2}{2}=1
        2x | x^2=2x
        x^2=4 | 4
        2x | \frac{dy}{dx}=3x
        \frac{AB}{CD}=\frac{2}{5} | \frac{5}{2}
        |AB|=7 | |AC|=7
        f(x)=2x | f(t)=2x
        f(x)=2x | g(t)=2t
        f(x)=2x | f(t)=3t
        f(x)=ax | f(a)=a^2
        5 | 4+1=5=6
        7 | 7 = 8 = x
        6 | 2x+3y=6 \text{ or } 7
        2x+3y=6 | 6
        \sin x=\frac12 | \frac12
        """),
    "one thing, spelled in many ways": (r"""
        10 | {52 \choose 0}\cdot 10
        \binom{52}{5} | {52 \choose 5}
        \frac13 | 0.\dot{3}
        \frac{1}{7} | 0.\dot{1}4285\dot{7}
        3 \pmod{7} | 3 \pmod 7
        10 | x\equiv10
        10 | x \equiv 10 \pmod{13}
        O(n^2) | \mathcal{O}(n^2)
        p\wedge q | p \land q
        1011_2 | (1011)_2
        1011_2 | 1011_{\text{two}}
        1011_2 | 1011_{(2)}
        3\text{ p.m.} | 3\text{ PM}
        2 | =2
        58500 | \,58,500
        58,500 | \$\,58,500
        24680 | 24,\! 680
        24680 | 24\, 680
        24680 | 24,\,680
        \frac{1+i}{\sqrt2} | \operatorname{cis}\frac{\pi}{4}
        2i | 2\operatorname{cis}(90^\circ)
        1+i\sqrt3 | 2\text{cis}60^\circ
        3-2i | \overline{3+2i}
        \text{ellipse} | \text{an ellipse}
        \frac{5}{8} | \frac 5 8
        8 | 2^(3)
        \sqrt[3]{2} | 2**(1/3)
        9,4,6 | {4,6,9}
        \pm 6 | {-6,6}
        a_1^2 | a^2_1
        \frac{\pi}{2} | \frac \pi 2
        \frac{x+1}{2} | {x+1 \over 2}
        3 \pmod 7 | 3 (\text{mod } 7)
        x \equiv 3 \pmod 7 | x\equiv 10\pmod{7}
        2,3,5 | 2\text{, }3\text{, and }5
        e^{2x} | e^(2x)
        3:00\text{ p.m.} | 3:00 PM
        58500 | x=\,58,500
        \text{DNE} | \text{The limit does not exist}
        """, r"""
        \frac13 | 0.\dot{3}1
        p\land q | p\lor q
        1011_2 | 1011_3
        1011_2 | 1011
        \frac{1+i}{\sqrt2} | \operatorname{cis}\frac{\pi}{3}
        3-2i | \overline{3-2i}
        2 | 2\text{ or } x
        58500 | 58,5,00
        3 \pmod 7 | 3 \pmod 5
        x=4 | x\equiv 4\pmod 9
        x\equiv 3\pmod 5 | x=3
        x \equiv 3 \pmod 7 | x\equiv 4\pmod{7}
        3:00\text{ p.m.} | 3:00\text{ a.m.}
        \text{DNE} | \text{does exist}
        """),
    "answers as models write them": (r"""
        \frac{3}{4} | \frac{3}{4} = 0.75
        75\% | \frac{3}{4}
        \frac{1}{2} | P = \frac{1}{2} = 50\%
        12 | \text{12 cm}
        12 | 12 \text{ square centimeters}
        12\pi | 12\pi \text{ cm}^3
        (2, -3) | \left(2,\, -3\right)
        (2,-3) | x = 2,\ y = -3
        x^2 + 2x + 1 | (x + 1)^2
        \sqrt{13} | \sqrt{13} \text{ units}
        \sqrt{13} | AB = \sqrt{13}
        \sqrt{13} | |z| = \sqrt{13}
        -\frac{1}{2} | m = -\frac{1}{2}
        y = 2x - 3 | 2x - y - 3 = 0
        [-2, 2] | -2 \leq x \leq 2
        (-\infty, 3) \cup (3, \infty) | x \neq 3
        (-\infty, 3) \cup (3, \infty) | \{x \mid x \neq 3\}
        (-\infty, 3) \cup (3, \infty) | \mathbb{R} \setminus \{3\}
        (-\infty, -2] \cup [2, \infty) | |x| \ge 2
        \frac{\pi}{3}, \frac{5\pi}{3} | x = \frac{\pi}{3} \text{ or } x = \frac{5\pi}{3}
        \frac{\pi}{3}, \frac{5\pi}{3} | \left\{\frac{\pi}{3}, \frac{5\pi}{3}\right\}
        2 + 3i | 3i + 2
        \begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix} | \begin{bmatrix} 1 \\ 2 \\ 3 \end{bmatrix}
        6 - 5i | 6 + (-5)i
        1,000,000 | 10^6
        0.08 | 8\%
        8\% | 0.08
        \$18.90 | 18.90
        18.9 | \$18.90
        \text{(C)} | \text{C}
        \text{(C)} | C
        \text{June 20} | June 20
        \text{Evelyn} | Evelyn
        \text{Evelyn} | \text{evelyn}
        11 \text{ and } 7 | 7, 11
        3\frac{1}{2} | 3.5
        3\frac{1}{2} | \frac{7}{2}
        \frac{9}{7} | 1 \frac{2}{7}
        2^{1007} | 2^{1007}
        -\frac{\sqrt{3}}{2} | -\dfrac{\sqrt3}{2}
        \tan 15^\circ | 2 - \sqrt{3}
        2-\sqrt3 | \tan(15^\circ)
        4x^2-1 | (2x-1)(2x+1)
        \frac{x+2}{7} | \frac{1}{7}(x+2)
        5.4 \text{ cents} | 5.4
        5 | \boxed{5}
        5 | 5\text{ students}
        5 | 5\text{ people}
        90 | 90^\circ
        x \in (-1, 1) | (-1,1)
        x>5 | x \in (5, \infty)
        \frac{7}{10} | 0.7
        1/3 | \frac{1}{3}
        10 | 10\text{ (units)}
        A=\frac{1}{2} | \frac12
        S_n = n^2 | n^2
        n^2 | S_n = n^2
        a_n=2n-1 | 2n-1
        e^{x}(x-1)+C | (x-1)e^x+C
        \ln|x|+C | \ln |x| + C
        \frac{1}{6} | \frac{6}{36} = \frac{1}{6}
        60 | 60\text{ mph}
        60 | 60 \text{ miles/hour}
        3, -3 | \pm 3
        2\sqrt{2} | \sqrt{8}
        \{(1,2), (2,1)\} | (1,2), (2,1)
        4:3 | \frac{4}{3}
        4:3 | 4 \text{ to } 3
        11:30\text{ a.m.} | 11{:}30 \text{ AM}
        -1 \le x < 2 | [-1,2)
        5 \times 10^{-3} | 0.005
        5 \times 10^{-3} | 5e-3
        k = 3 | 3
        (x-2)^2+(y+1)^2=9 | (x - 2)^2 + (y + 1)^2 = 3^2
        \frac{x^2}{4}+\frac{y^2}{9}=1 | 9x^2+4y^2=36
        13 \text{ R } 2 | 13 \text{ R } 2
        \text{Tuesday} | \text{It is Tuesday}
        \left[\frac{1}{2}, 2\right) | x\in[0.5,2)
        (-\infty, \frac{1}{2}] | x \leq 0.5
        f(x) = x^2 - 3 | x^2-3
        2.5 \times 10^4 | 25,000
        10:15 | 10:15
        7, -3 | x_1=7, x_2=-3
        x_1=7, x_2=-3 | -3, 7
        24 | \text{Area} = 24 \text{ cm}^2
        5 | 2x=10 \Rightarrow x=5
        5 | x = 5 \text{ m/s}
        5 | \therefore x = 5
        2 | \log_3 9 = 2
        \frac{1}{4} | \frac14 = 0.25 = 25\%
        120^\circ | \angle B = 120^\circ
        \frac{2\pi}{3} | \frac{2\pi}{3} \text{ radians}
        5\sqrt{2} | 5\sqrt{2} \text{ cm}
        5\sqrt{2} | 5 \cdot \sqrt{2}
        5\sqrt{2} | 5\times\sqrt{2}
        5\sqrt2 | \sqrt{50}
        2 | 2 \text{ (mod 5)}
        2 | 2 \bmod 5
        \{2\} | 2
        (3,4) | (3, 4)\text{.}
        3x^2 | 3x^{2}.
        3x^2 | 3 x ^ 2
        1+\sqrt{2} | \sqrt{2}+1
        x=1+\sqrt2 | 1+\sqrt{2}
        17 | \mathbf{17.}
        17 | **17**
        17 | 17 \checkmark
        17 | \text{17}
        17 | \$17
        17 | 17~\text{dollars}
        17 | 17 \text{ units}^2
        17 | \textbf{17 cm}
        17 | n=17
        17 | \text{n = 17}
        17 | 17\text{ ways.}
        0.5 | 0.50
        -3 | -3.0
        \frac{5}{2} | 2.5
        \frac{5}{2} | 5/2
        \frac{5}{2} | (5)/(2)
        \frac{5}{2} | \left(\frac{5}{2}\right)
        \frac{5}{2} | {5 \over 2}
        \frac{a}{b} | a/b
        \sqrt{3} | \sqrt3
        \sqrt{3} | 3^{1/2}
        \sqrt{3} | 3^{0.5}
        \pi r^2 | \pi r^{2}
        4 \text{ hours} | 4 \text{ h}
        1{,}234 | 1234
        12345 | 12\,345
        (0,\infty) | x>0
        (0, \infty) | \{x : x > 0\}
        (0,\infty) | \mathbb{R}^+
        \text{all real numbers} | (-\infty, \infty)
        \mathbb{Z} | \mathbb Z
        B | \text{Option B}
        B | \text{B) } 12
        \text{No solution} | \text{no solutions}
        \text{No solution} | \text{There is no solution}
        30\% | 30 \text{ percent}
        30\% | 0.3
        \frac{\sqrt{6}+\sqrt{2}}{4} | \cos 15^\circ
        \frac{\sqrt{6}+\sqrt{2}}{4} | \frac{1}{4}(\sqrt{2}+\sqrt{6})
        \begin{pmatrix}3\\-7\end{pmatrix} | \begin{pmatrix}3\\-7\end{pmatrix}.
        \begin{pmatrix}3\\-7\end{pmatrix} | \mathbf{v}=\begin{pmatrix}3\\-7\end{pmatrix}
        \begin{pmatrix}3\\-7\end{pmatrix} | \vec{v} = \begin{bmatrix}3\\-7\end{bmatrix}
        \begin{pmatrix}3&1\\0&2\end{pmatrix} | \mathbf{A}=\begin{pmatrix}3&1\\0&2\end{pmatrix}
        y = -\frac{1}{2}x + 3 | y = 3 - \frac{x}{2}
        x + 2y = 6 | y = -\frac{1}{2}x+3
        2^{10} - 1 | 1023
        n! | n!
        \binom{n}{k} | \frac{n!}{k!(n-k)!}
        \frac{n(n+1)}{2} | \frac{n^2+n}{2}
        (a+b)^2 | a^2+2ab+b^2
        \text{odd} | \text{Odd}
        x^3+3x-6 | 3x + x^3 - 6
        6 | \lim_{n\to\infty} a_n = 6
        6 | \sum_{k=1}^{3} k = 6
        6 | \int_0^1 6\,dx = 6
        6 | |A| = 6
        6 | \#S = 6
        6 | \gcd(12,18)=6
        6 | N = 2\cdot 3 = 6
        """, r"""
        75\% | \frac{3}{5}
        12 | 12x
        (2,-3) | (-3,2)
        y=2x-3 | y=2x+3
        [-2,2] | (-2,2)
        (-\infty,3) | x \le 3
        \sqrt{13} | 13
        -\frac12 | \frac12
        6-5i | 6+5i
        \frac{\pi}{3}, \frac{5\pi}{3} | \frac{\pi}{3}
        \begin{pmatrix} 1 \\ 2 \end{pmatrix} | (2,1)
        1,000,000 | 10^5
        0.08 | 0.8\%
        \text{(C)} | \text{(B)}
        \text{Evelyn} | \text{Carla}
        3\frac{1}{2} | \frac{31}{2}
        \tan 15^\circ | 2+\sqrt3
        4x^2-1 | 4x^2+1
        60 | 60k
        60 | 60^2
        2\sqrt2 | 2\sqrt{3}
        4:3 | 3:4
        11:30\text{ a.m.} | 11:30\text{ p.m.}
        k=3 | m=3
        \frac{x^2}{4}+\frac{y^2}{9}=1 | \frac{x^2}{9}+\frac{y^2}{4}=1
        5 | 5\text{ or more}
        5 | 5 \pm 1
        5 | \approx 5.2
        5 | \frac{5}{1000}
        5 | 5\text{ hundredths}
        7 | 7\text{ sevens}
        4 | 2 = 4
        x+1 | x+1=0
        x+1 | y
        2x+1 | f(x)=2x-1
        2 | x=2y
        2 | 2:1
        10 | (10)_2
        10 | 10_2
        8 | 10_8
        16 | 4^{3}
        0 | \text{none}
        \emptyset | \{\emptyset\}
        (0,1) | \{0,1\}
        1 | 1\text{ dozen}
        5 | \overline{5}
        1-i | \overline{1-i}
        \frac{1}{3} | 0.3\overline{4}
        x<2 | x<-2
        x<2 | -x<2
        |x|<3 | x<3
        (1,2)\cup(3,4) | (1,4)
        (1,2)\cup(3,4) | (1,2)\cap(3,4)
        x\ge 2 | [2,3]
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | 2\begin{pmatrix}1&2\\3&4\end{pmatrix}
        \sqrt{2} | \sqrt{2}\approx 2
        \text{Yes} | \text{No}
        \text{no} | \text{not no}
        \text{increasing} | \text{not increasing}
        \text{increasing} | \text{decreasing}
        100 | 100\text{ squared}
        3 | \sqrt{3}^2\text{ or }2
        a=1,b=2 | a=2,b=1
        n | n!
        6 | 3!!
        P(A)=\frac16 | P(B)=\frac16
        f(2)=3 | f(3)=3
        \angle A=30^\circ | \angle B=30^\circ
        7, -3 | x_1=7, x_2=3
        (-\infty, \frac12] | x<0.5
        5 | 2x=10 \Rightarrow x=6
        5 | x=5 \Rightarrow y=6
        p \Rightarrow q | q
        17 | 17\text{ is too small}
        17 | 17 \text{ or } 18
        17 | 17!
        17 | 1.7
        17 | 17\text{ thousand}
        \sqrt3 | 3^{1/3}
        \sqrt3 | 1.732
        (0,\infty) | x\ge 0
        (0,\infty) | [0,\infty)
        B | \text{Option C}
        B | \text{B or C}
        x+2y=6 | x+2y=7
        30\% | 3\%
        n! | n
        y=-\frac12x+3 | y=\frac12x+3
        2^{10}-1 | 1024
        120^\circ | 120 \text{ radians or } 60^\circ
        \frac{2\pi}{3} | 120
        \text{No solution} | \text{one solution}
        \mathbb{Z} | \mathbb{R}
        \mathbb{Z} | \mathbb{N}
        (3,4) | (3,4,5)
        6 | |A| = 7
        6 | \sum_{k=1}^{4} k = 10
        6 | 6 = 5 + 2
        6 | 5+1+1=6
        6 | 2\cdot 2=6
        """),
    "an answer that is nothing": (r"""
        """, r"""
        5 |
        5 | \text{}
        5 | {}
        5 | ()
        0 | \quad
        """),
}

# whole responses: gold, response, right, why
RESPONSES = [
    ("5", r"<think> 2+3 </think> \boxed{5}", True, "the box behind the tag"),
    ("5", r"\boxed{5}", True, "no tags at all: it counts as a whole"),
    ("5", r"\fbox{5}", True, "fbox is a box"),
    ("5", r"\boxed {5}", True, "TeX allows the space"),
    ("5", r"The answer is $\boxed{5}$.", True, "in a sentence"),
    ("5", r"\boxed{3} no, \boxed{5}", True, "the last box wins"),
    ("5", r"\boxed{5} no, \boxed{3}", False, "the last box wins"),
    ("5", r"\boxed{5} and \boxed{3}", False, "two boxes are not a set"),
    ("5", r"\boxed{\boxed{5}}", True, "a box in a box"),
    ("5", r"\boxed{\fbox{5}}", True, "a box in a box"),
    ("5", r"<think> \boxed{5} </think> so it is", False, "a box among the thoughts is not an answer"),
    ("5", r"<think> \boxed{3} </think> \boxed{5}", True, "only what follows the tag counts"),
    ("5", r"<think> a </think> \boxed{5} </think> \boxed{3}", False, "the last closing tag counts"),
    ("5", r"<think> a </think> \boxed{5} </think>", False, "nothing follows the last closing tag"),
    ("5", r"<think> \boxed{5}", False, "thoughts not closed"),
    ("5", r"<think> a </think> \boxed{5} <think> wait", False, "thoughts opened again"),
    ("5", r"thoughts </think> \boxed{5}", True, "the prompt may have opened the tag"),
    ("5", r"\boxed{5", False, "an unclosed box is wrong"),
    ("5", r"\boxed{5} \boxed{5", False, "an unclosed last box is wrong"),
    ("5", r"\boxed{\text{5}", False, "an unclosed box is wrong"),
    ("5", r"\boxed5", False, "no braces, no box"),
    ("5", r"The answer is 5", False, "no box"),
    (r"\frac12", r"\\boxed{\\frac{1}{2}}", True, "backslashes doubled, as in JSON"),
    ("7", r"so \\[ \\boxed{7} \\]", True, "backslashes doubled, as in JSON"),
    ("7", r"\\boxed{8}", False, "backslashes doubled, as in JSON"),
    ("7", r"x \\ \boxed{7}", True, "a new line before the box"),
    ("7", r"x \\\boxed{7}", True, "a new line before the box"),
    ("5", r"</think> I did not use <think> tags. \boxed{5}", True, "a tag only spoken of"),
    ("5", r"<think> a </think> \boxed{5}. My thoughts stand in `<think>`.", True, "a tag only spoken of"),
    ("5", r"<think> a </think> \boxed{5} stands behind the </think> tag.", True, "a tag only spoken of"),
    ("5", "</think>\n<think>\nagain \\boxed{5}", False, "thoughts opened again"),
    ("5", r"</think> so <think> again \boxed{5}", False, "thoughts opened again"),
    ("5", r"", False, "nothing"),
    ("5", r"\boxed{}", False, "an empty box"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True, "braces within"),
    (r"\{1,2\}", r"\boxed{\{1, 2\}}", True, "escaped braces do not count"),
    ("", r"\boxed{}", False, "an empty gold is never rewarded"),
    ("", r"", False, "an empty gold is never rewarded"),
    (" ", r"\boxed{ }", False, "an empty gold is never rewarded"),
    (r"\text{}", r"\boxed{\text{}}", False, "an empty gold is never rewarded"),
    ("5", r"\boxed{5}" + " x" * 100_000, True, "a long text behind"),
    ("5", "x " * 100_000 + r"\boxed{5}", True, "a long text before"),
    ("5", r"\boxed{" + "x" * 200_000 + "}", False, "junk"),
]

# -- letters -------------------------------------------------------------------------------------------------

OPTIONS = {"letter": "C", "options": ["5 N", "10 N", "12 N", "50 N"]}

EV = {"letter": "B", "options": ["1.1 eV", "3.2 eV", "5.4 eV", "7.9 eV"]}
WORDS = {"letter": "C", "options": ["decreases", "stays the same", "increases", "A proton"]}
SYMBOLS = {"letter": "D", "options": ["H", "He", "C", "N"]}

# why -> responses that choose B, a line each; responses that choose nothing
LETTER_LINES = {
    "fonts and sizes in a box": (r"""
        \boxed{\boldsymbol{B}}
        \boxed{\bm{B}}
        \boxed{\textsf{B}}
        \boxed{\texttt{B}}
        \boxed{\textbf{\textit{B}}}
        \boxed{\underline{B}}
        \boxed{\mathbf B}
        \boxed{\large B}
        \boxed{\Large{B}}
        \boxed{{\bf B}}
        \boxed{{B}}
        \boxed{\color{red}{B}}
        \boxed{\left(B\right)}
        \boxed{\,B\,}
        \boxed{"B"}
        \boxed{\(B\)}
        \\boxed{B}
        $\\boxed{\\text{(B)}}$
        """, r"""
        \boxed{\vec{B}}
        \boxed{\mathbb{B}}
        \boxed{\ce{B}}
        """),
    "a letter and more in a box": (r"""
        \boxed{B - 3.2 eV}
        \boxed{\text{B – 3.2 eV}}
        \boxed{\text{B} \;-\; 3.2\text{ eV}}
        \boxed{B \to 3.2\text{ eV}}
        \boxed{\text{B only}}
        \boxed{B \quad 3.2\text{ eV}}
        \boxed{\text{B}\ (3.2\,\text{eV})}
        \boxed{\textbf{(B)}\ 3.2\ \mathrm{eV}}
        \boxed{\text{The answer is B}}
        \boxed{\text{Option (B)}}
        \boxed{\text{B is correct}}
        \boxed{\text{B. A proton moves}}
        """, r"""
        \boxed{A - B}
        \boxed{A \;-\; B}
        \boxed{A \to B}
        \boxed{B - 5 = 2}
        \boxed{B = 2\text{ T}}
        \boxed{B(r)}
        \boxed{B_2}
        \boxed{B'}
        \boxed{B + O_2}
        \boxed{B \times C}
        \boxed{Boron}
        \boxed{\text{not B}}
        \boxed{\text{B is wrong}}
        \boxed{\text{B}, \text{C}}
        \boxed{B \quad C}
        \boxed{B \& C}
        \boxed{\text{B (or C)}}
        \boxed{\text{B) 5 N and C) 12 N}}
        \boxed{\text{Both A and B}}
        """),
    "the answer is": (r"""
        The answer must be B.
        The answer should be B
        The answer would be B.
        The answer has to be B.
        The answer is clearly B.
        The answer is therefore **B**.
        The answer, therefore, is B.
        The answer must therefore be B.
        The answer to the question is B.
        The correct one is B.
        The best answer is B.
        The answer is \(B\).
        The answer is $\mathbf{B}$.
        The answer is (b) because
        The answer is B because A is wrong.
        The answer is B, and A is wrong.
        The answer is B, I think.
        My choice is B.
        I choose option B.
        I would pick B.
        I'd go with (B).
        We choose option B.
        Therefore, B.
        So it is B.
        It's B.
        The answer is, of course, B.
        This corresponds to option B.
        """, r"""
        The answer is a sum.
        The answer is A sum.
        The answer is hardly B
        The answer is either A or B
        The answer could be B.
        Is the answer B?
        I would not pick B.
        I chose B as the field
        We choose B = 5
        This does not match option B.
        I think that is it.
        Answer: I think so
        A careful analysis is needed.
        **A careful analysis** is needed
        """),
    "a label": (r"""
        Ans: B
        Ans. B
        ANSWER: B
        Choice: B
        Option: B
        Option B
        Option B.
        **Option B**
        Answer - B
        Answer → B
        Answer => B
        Answer (B)
        Answer B
        Answer: "B"
        Answer: `B`
        Answer: {B}
        Answer: \(B\)
        Answer: __B__
        Answer: Option B
        Answer: I think B
        Answer：B
        <answer>B</answer>
        <answer> (B) 3.2 eV </answer>
        {"answer": "B"}
        {'final_answer': 'B'}
        {"answer": "B", "confidence": "A"}
        """, r"""
        Answer: B, C
        Answer: (B) (C)
        Answer: B & C
        Answer: B|C
        Answer: B vs. C
        Answer: B and/or C
        The answer is B or maybe C
        Answer: B and C are right
        <answer>B, C</answer>
        {"answer": ["B", "C"]}
        Answer: B-14
        Answer: B_2
        Answer: BN
        Answer: \ce{B}
        Answer: 25 B
        The answer is B = 5
        </answer>B major
        Confidence: **B**
        Vitamin **B**
        """),
    "alone": (r"""
        B) 3.2 eV
        (B) 3.2 eV
        B. 3.2 eV
        B: 3.2 eV
        B, because the others are too small.
        - B
        > B
        *B*
        __B__
        `B`
        "B"
        $B$
        \(B\)
        $\boldsymbol{B}$
        """, r"""
        B or C
        B, C
        A B C
        Is it B?
        25 °B
        B is an element
        """),
    "what is denied is not chosen": (r"""
        The answer is not A but B.
        The answer isn't A, but B.
        The answer is not A; it is B.
        The answer is B, not A.
        Answer: B (not A)
        Option A is wrong. Option B is correct.
        Answer: A is wrong; B is correct.
        The answer can't be A, so it is B.
        """, r"""
        Answer: not B
        The answer cannot be B.
        The answer isn't B
        Option B is wrong.
        Answer (B) is wrong
        **B)** wrong
        B is not correct.
        A or B is correct.
        Neither A nor B is correct
        If the answer is B, then x = 3.
        I do not think the answer is B.
        I don't think that B is correct
        Whether B is correct is unclear
        B is right of C
        B is the correct symbol for boron
        """),
}

# the letter found (None: no answer), response, truth, why
LETTERS = [
    ("C", "c", "C", "nothing but a small letter"),
    ("C", "(c).", "C", "nothing but a small letter"),
    (None, "c is it", "C", "a small letter in a sentence"),
    ("C", r"\boxed{C}", "C", "a box"),
    ("C", r"<think> \boxed{A} </think> \boxed{C}", "C", "only what follows the tag"),
    (None, r"<think> \boxed{C} </think> so it is", "C", "a letter among the thoughts"),
    (None, r"<think> \boxed{C}", "C", "thoughts not closed"),
    ("C", r"\boxed{(C)}", "C", "parentheses"),
    ("C", r"\boxed{\text{C}}", "C", "text"),
    ("C", r"\boxed{\text{(C)}}", "C", "text and parentheses"),
    ("C", r"\boxed{\textbf{C}}", "C", "bold in TeX"),
    ("C", r"\boxed{\mathrm{C}}", "C", "roman in TeX"),
    ("C", r"$\boxed{C}$", "C", "mathematics around it"),
    ("C", r"\boxed{C.}", "C", "a full stop"),
    ("C", r"\boxed{C) 12 N}", "C", "with the option's text"),
    ("C", r"\boxed{C. twelve}", "C", "with some text"),
    ("C", r"\boxed{\text{C. twelve}}", "C", "with some text"),
    ("C", r"\boxed{C: 12}", "C", "with some text"),
    ("C", r"\boxed{c}", "C", "a small letter in a box"),
    ("C", r"\boxed{Option C}", "C", "the word before"),
    ("C", r"\fbox{C}", "C", "fbox"),
    ("C", r"\boxed{A} no: \boxed{C}", "C", "the last one wins"),
    ("A", r"\boxed{C} no: \boxed{A}", "C", "the last one wins"),
    (None, r"\boxed{A, C}", "C", "two letters"),
    (None, r"\boxed{AC}", "C", "two letters"),
    (None, r"\boxed{A or C}", "C", "two letters"),
    (None, r"\boxed{(A) and (C)}", "C", "two letters"),
    (None, r"\boxed{C, A}", "C", "two letters"),
    (None, r"\boxed{C} \boxed{C", "C", "an unclosed box is no answer"),
    (None, r"\boxed{12}", "C", "no letter, and no options to compare with"),
    (None, r"\boxed{}", "C", "an empty box"),
    ("C", "Answer: C", "C", "the usual line"),
    ("C", "Answer: (C)", "C", "parentheses"),
    ("C", "Answer: **C**", "C", "bold"),
    ("C", "**Answer:** C", "C", "bold before"),
    ("C", "**Answer: C**", "C", "bold around"),
    ("C", "**Answer**: (C) 12 N", "C", "with the option's text"),
    ("C", "Final answer: C.", "C", "a full stop"),
    ("C", "answer: c", "C", "a small letter at the end of a line"),
    ("C", "Answer: $C$", "C", "dollars"),
    ("C", r"Answer: \text{C}", "C", "text"),
    ("C", r"The final answer is $\boxed{\text{C}}$.", "C", "all at once"),
    ("C", "The answer is (C).", "C", "a sentence"),
    ("C", "The answer is C", "C", "a sentence"),
    ("C", "the correct answer is C, because of A", "C", "what follows is a reason"),
    ("C", "The correct option is C.", "C", "a sentence"),
    ("C", "So the correct choice is (C) 12 N.", "C", "a sentence"),
    ("C", "The answer is option C.", "C", "the word between"),
    ("C", "The answer is: C", "C", "a colon"),
    ("C", "Option C is correct.", "C", "a sentence the other way round"),
    ("C", "(C) is the correct one", "C", "a sentence the other way round"),
    ("C", "Answer: A\nWait.\nAnswer: C", "C", "the last one wins"),
    ("A", "Answer: C\nWait.\nAnswer: A", "C", "the last one wins"),
    ("C", r"\boxed{C} Hmm. Answer: A", "C", "a box outranks what is stated, wherever it stands"),
    ("C", r"Answer: A. Hmm. \boxed{C}", "C", "a box outranks what is stated, wherever it stands"),
    ("C", "**C**", "C", "bold"),
    ("C", "It must be **(C)**.", "C", "bold"),
    ("C", "**C) 12 N**", "C", "bold, with text"),
    ("C", "C", "C", "a letter alone"),
    ("C", "(C)", "C", "a letter alone"),
    ("C", "12 N is right.\n\nC.", "C", "a letter on its own line"),
    (None, "The answer is a bit unclear", "A", "an article is no letter"),
    (None, "The answer is not C", "C", "a denial"),
    (None, "Answer: A or C", "C", "two letters"),
    (None, "Answer: C / D", "C", "two letters"),
    (None, "The answer is (A) and (C)", "C", "two letters"),
    (None, "**A** or **C**", "C", "two letters"),
    (None, "Consider A and B first.", "A", "letters in passing"),
    (None, "Answer: Carbon", "C", "a word that begins with it"),
    (None, "I cannot tell.", "I", "a pronoun"),
    (None, "", "C", "nothing"),
    (None, r"\boxed{K}", "K", "beyond J, where the options are not known"),
    (None, r"\boxed{Z}", "C", "beyond J"),
    ("J", r"\boxed{J}", "J", "ten options are possible"),
    ("C", r"\boxed{C}", OPTIONS, "options known"),
    (None, r"\boxed{E}", OPTIONS, "beyond the four options"),
    (None, r"\boxed{E}", {**OPTIONS, "letter": "E"}, "beyond the four options, even if the truth says so"),
    ("C", r"\boxed{12 N}", OPTIONS, "the text of an option"),
    ("C", r"\boxed{12\text{ N}}", OPTIONS, "the text of an option, in TeX"),
    ("A", r"\boxed{5 N}", OPTIONS, "the text of another option"),
    (None, r"\boxed{2 N}", OPTIONS, "the text of no option"),
    ("C", "The answer is 12 N.", OPTIONS, "the text of an option, in a sentence"),
    ("C", "12 N", OPTIONS, "the text of an option alone"),
    (None, "12 N or 5 N", OPTIONS, "two options"),
    (None, r"\boxed{5}", {"letter": "A", "options": ["5", "5"]}, "a text that two options have"),
    ("C", r"\boxed{C}", "(C)", "a truth in parentheses"),
    ("C", r"\boxed{C}", "c", "a truth in small letters"),
    ("B", "\\boxed{B}\n\n**Why not the others**\n- **A)** small\n- **D)** no", "B", "bold behind"),
    ("B", "**Answer: B**\n\n**A.** wrong\n**C.** wrong\n**D.** wrong", "B", "the others in bold behind"),
    ("B", "The answer is B.\n\n- **A)** too small\n- **C)** too large", "B", "the others in bold behind"),
    ("B", "\\boxed{B}\n\nD", "B", "a stray line behind a box"),
    ("B", "Answer: B\n\nD", "B", "a stray line behind a statement"),
    ("B", "Answer: B\n\nConfidence: **A**", "B", "a grade in bold"),
    ("B", "**B**\n\nConfidence: **A**", "B", "a grade in bold, behind a letter in bold"),
    ("B", "Answer: B\n\nNote: vitamin **C** helps.", "B", "a vitamin in bold"),
    ("B", "**A**\nAnswer: B\n**C**", "B", "a statement outranks bold"),
    ("B", "<answer>B</answer>\n\n**A** is too small", "B", "a tag outranks bold"),
    ("C", "Answer: A\n\nAnswer: C\n\n**B**", "C", "the last statement"),
    ("D", "Answer: D\n\n\\boxed{x = 3}", "D", "a box without a letter says nothing"),
    ("D", "\\boxed{x = 3}\n\nAnswer: D", "D", "a box without a letter says nothing"),
    ("D", r"\boxed{D}, for x is \boxed{x = 3}", "D", "a box without a letter says nothing"),
    ("B", r"Answer: B, as \boxed{v} is small", EV, "a symbol is no option"),
    (None, "\\boxed{A, C}\nAnswer: A", "A", "two letters in a box"),
    (None, r"\boxed{A} or \boxed{C}", "C", "two letters in two boxes"),
    ("B", r"\boxed{3.2\text{ eV}} Answer: A", EV, "an option's text in a box outranks too"),
    ("B", "Answer:\n\n(B) 3.2 eV", "B", "on the next line"),
    ("B", "## Final answer\n\n**B**", "B", "a heading before"),
    ("B", "```json\n{\"reason\": \"A is small\", \"answer\": \"B\"}\n```", "B", "JSON"),
    ("B", "We compute.\n\nB) 3.2 eV", "B", "the last line"),
    ("B", "We compute.\n\n(B) 3.2 eV", EV, "the last line"),
    ("B", "We compute.\n\nB. 3.2 eV", "B", "the last line"),
    ("B", "We compute.\n\n- B", "B", "a bullet"),
    ("B", "**B** and vitamin **K**", EV, "a vitamin beyond the options"),
    (None, "A) 1\nB) 2\nC) 3\nD) 4", "D", "the options, one by one"),
    (None, "(A) 1 eV\n(B) 2 eV", "B", "the options, one by one"),
    (None, "- A\n- B\n- C\n- D", "D", "the options, one by one"),
    (None, "A\nB\nC\nD", "D", "the options, one by one"),
    (None, "Options:\nA) 1\nB) 2", "A", "the options, one by one"),
    (None, "A: 3.2 eV", EV, "the letter of one option, the text of another"),
    ("B", r"\boxed{3.2\,\mathrm{eV}}", EV, "the text of an option"),
    ("B", r"\boxed{3.2\ \text{eV}}", EV, "the text of an option"),
    ("B", r"\boxed{3.2~\textbf{eV}}", EV, "the text of an option"),
    ("B", r"\boxed{\mathbf{3.2\;eV}}", EV, "the text of an option"),
    ("B", "So:\n\n**3.2 eV**", EV, "the text of an option on the last line"),
    ("B", '{"answer": "3.2 eV"}', EV, "the text of an option in JSON"),
    ("B", r"<answer>$3.2\,\text{eV}$</answer>", EV, "the text of an option in a tag"),
    (None, r"\boxed{32\text{ eV}}", EV, "the point counts"),
    (None, r"\boxed{3.2\text{ EV}}", EV, "capitals of a unit count"),
    ("D", "The answer is A proton.", WORDS, "an article that begins the text of an option"),
    ("C", r"\boxed{\text{Increases}}", WORDS, "capitals of a word do not count"),
    ("C", r"\boxed{C\ \text{increases}}", WORDS, "a letter and its own text"),
    (None, "**E**", EV, "beyond the four options"),
    ("C", r"\boxed{C. No change}", "C", "a text that begins like a denial"),
    ("C", "Answer: C) Not enough information", "C", "a text that begins like a denial"),
    ("B", "**B) Too small**", "B", "a text that begins like a denial"),
    ("D", "Answer: D) N", SYMBOLS, "an option that is a letter itself"),
    ("C", r"\boxed{C. C}", SYMBOLS, "an option that is a letter itself"),
    ("B", "The answer is B.\nHowever, A is also correct.", "B", "an afterthought"),
]
for why, (chosen, refused) in LETTER_LINES.items():
    for letter, block in (("B", chosen), (None, refused)):
        LETTERS += [(letter, line.strip(), "B", why) for line in block.splitlines() if line.strip()]

# -- code ----------------------------------------------------------------------------------------------------


def stdio(*tests, **settings):
    return {"kind": "stdio", "tests": [{"input": i, "output": o} for i, o in tests], "time_limit_s": 1,
            "memory_limit_mb": 256, **settings}


def function(*tests, **settings):
    return {"kind": "function", "fn_name": "f", "tests": [{"input": i, "output": o} for i, o in tests],
            "time_limit_s": 1, "memory_limit_mb": 256, **settings}


def checked(program, *tests):
    return stdio(*tests or [("", "2")], checker="program", program=program)


SORTED = """import sys
_, expected, got = (open(name).read().split() for name in sys.argv[1:])
print(int(sorted(expected) == sorted(got)))
"""
ORDER = checked(SORTED, ("3", "3 2 1"))
ORDERS = checked(SORTED, ("3", "3 2 1"), ("4", "4 3 2 1"))
ADD = stdio(("1 2\n", "3\n"), ("5 7\n", "12\n"))
TWO = stdio(("", "2"))
F = function(([1], 2), ([5], 6))
NAMELESS = {**F, "fn_name": None}


def outputs(checker, expected, printed):
    program = f"import sys; sys.stdout.buffer.write({printed.encode()!r})"
    return program, stdio(("", expected), checker=checker)


def returns(checker, expected, value):
    program = f"nan, inf = float('nan'), float('inf')\ndef f(): return {value}"
    return program, function(([], expected), checker=checker)


def solution(arguments, value):
    return f"class Solution:\n    def f(self, {arguments}): return {value}"


DEEP = "def g(n): return n and 1 + g(n - 1)\nprint(g({0}) - {0} + 2)"
STACKED = ("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
           "    def __getattr__(self, name): return getattr(self, name + 'x'[:0])\nA().x")
NUMPY = stdio(("", "2"), time_limit_s=3)
FILLED = stdio(("", "2"), memory_limit_mb=1024, time_limit_s=4)


# verdict, why, program, truth
CODE = [
    ("AC", "right", "print(sum(map(int, input().split())))", ADD),
    ("WA", "wrong", "print(4)", ADD),
    ("WA", "right on the first test only", "print(3)", ADD),
    ("WA", "prints nothing", "", ADD),
    ("WA", "prints more than asked", "print(sum(map(int, input().split())))\nprint(0)", ADD),
    ("RE", "an exception", "print(3)\nraise ValueError", ADD),
    ("RE", "reads beyond the input", "input(); input()", ADD),
    ("CE", "no Python", "def f(:", TWO),
    ("CE", "a null byte", "print(2)\0", TWO),
    ("CE", "a lone surrogate", "print('\udc80')", TWO),
    ("CE", "nested too deeply for the compiler", "(" * 5000 + ")" * 5000, TWO),
    ("AC", "exit() is there as usual", "print(2); exit()", TWO),
    ("AC", "SystemExit with status 0 is an ordinary end", "import sys\nprint(2)\nsys.exit(0)", TWO),
    ("RE", "SystemExit with another status", "import sys\nprint(2)\nsys.exit(3)", TWO),
    ("RE", "SystemExit with a message", "import sys\nprint(2)\nsys.exit('bad')", TWO),
    ("AC", "an early exit after the right output", "import os\nprint(2, flush=True)\nos._exit(0)", TWO),
    ("WA", "an early exit before any output", "import os\nos._exit(0)", TWO),
    ("RE", "killed by its own signal", "import os\nprint(2, flush=True)\nos.kill(os.getpid(), 15)", TWO),
    ("RE", "a crash of the interpreter", "import ctypes\nctypes.string_at(0)", TWO),
    ("AC", "__main__ is as usual", "if __name__ == '__main__': print(2)", TWO),
    ("AC", "modules, classes and recursion work",
     "import sys, math, collections\nsys.setrecursionlimit(10**6)\nclass A:\n    def g(self, n):\n"
     "        return n and self.g(n - 1)\nprint(A().g(20000) + 2)", TWO),
    ("AC", "a thread with a large stack, as deep recursions use",
     "import sys, threading\nthreading.stack_size(2**26)\ndef g(): print(2)\n"
     "t = threading.Thread(target=g); t.start(); t.join()", TWO),
    ("AC", "standard error is not looked at", "import sys\nprint('x', file=sys.stderr)\nprint(2)", TWO),
    # time, memory, processes, output
    ("TLE", "computes for ever", "while True: pass", TWO),
    ("TLE", "computes for ever after the right output", "print(2, flush=True)\nwhile True: pass", TWO),
    ("TLE", "sleeps", "import time\nprint(2, flush=True)\ntime.sleep(60)", TWO),
    ("TLE", "ignores the signals that can be ignored",
     "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except (OSError, ValueError): pass\nwhile True: pass", TWO),
    ("TLE", "turns its timer off",
     "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass", TWO),
    ("TLE", "computes in C, where Python cannot interrupt", "9 ** 9 ** 9", TWO),
    ("MLE", "a large object", "x = bytearray(10**9)", TWO),
    ("MLE", "grows", "x = []\nwhile True: x.append(' ' * 10**6)", TWO),
    ("WA", "hogs memory, and hides the error", "try: x = bytearray(10**10)\nexcept MemoryError: pass", TWO),
    ("RE", "a fork bomb ends at the limit of processes", "import os\nwhile True: os.fork()", TWO),
    ("TLE", "a fork bomb that hides the error",
     "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TWO),
    ("RE", "a bomb of threads", "import threading, time\nfor _ in range(10**5):\n"
     "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", TWO),
    ("AC", "what a child does in the background ends with the program",
     "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nelse: print(2)", TWO),
    ("OLE", "infinite output", "while True: print('x' * 1000)", TWO),
    ("OLE", "infinite output that hides the error",
     "import os\nwhile True:\n    try: os.write(1, b'x' * 10**6)\n    except OSError: pass", TWO),
    ("OLE", "infinite errors", "import os\nwhile True: os.write(2, b'x' * 10**6)", TWO),
    ("RE", "a large file", "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(10**6))", TWO),
    ("RE", "many files in memory",
     "for i in range(1000):\n    with open(f'/dev/shm/{i}', 'wb') as f: f.write(bytes(10**6))", TWO),
    ("RE", "anonymous memory beside the limit", "import os\nos.memfd_create('x')", TWO),
    # outside
    ("RE", "reads a file of the host", "print(open('HOSTFILE').read())", TWO),
    ("RE", "reads root's home", "import os\nprint(os.listdir('/root'))", TWO),
    ("RE", "reads the passwords", "print(open('/etc/shadow').read())", TWO),
    ("RE", "writes beside the host's file", "open('HOSTFILE.new', 'w')", TWO),
    ("RE", "writes to the system", "open('/usr/bin/prism-was-here', 'w')", TWO),
    ("RE", "writes to the root", "open('/prism-was-here', 'w')", TWO),
    ("AC", "writes to its own scratch folder", "open('/tmp/prism-was-here', 'w').write('x')\nprint(2)", TWO),
    ("AC", "and nothing of the last run is left there",
     "import os\nprint(2 if os.listdir('/tmp') == [] else 3)", TWO),
    ("RE", "connects to the network", "import socket\nsocket.create_connection(('1.1.1.1', 80), 1)", TWO),
    ("RE", "connects to a port of the host",
     "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", TWO),
    ("AC", "sees no process but its own",
     "import os\nprint(2 if len([p for p in os.listdir('/proc') if p.isdigit()]) <= 2 else 3)", TWO),
    ("AC", "is nobody", "import os\nprint(2 if os.getuid() == 65534 else 3)", TWO),
    ("RE", "becomes root", "import os\nos.setuid(0)", TWO),
    ("AC", "has an empty environment",
     "import os\nprint(2 if not {'SECRET', 'USER', 'SSH_AUTH_SOCK'} & set(os.environ) else 3)", TWO),
    ("AC", "the answers are not in the sandbox",
     "import os\nfound = [f for f in range(3, 64) if os.path.exists(f'/proc/self/fd/{f}')]\n"
     "print(2 if all(b'SECRET-OUTPUT' not in os.pread(f, 9999, 0) for f in [0]) else 3)", TWO),
    # checkers, stdio
    ("AC", "tokens: white space is free", *outputs("tokens", "1 2\n3", " 1\t2 3 \n\n")),
    ("AC", "tokens: line ends of another system", *outputs("tokens", "1\n2", "1\r\n2\r\n")),
    ("WA", "tokens: 1.0 is not 1", *outputs("tokens", "1", "1.0")),
    ("WA", "tokens: case counts", *outputs("tokens", "YES", "Yes")),
    ("WA", "tokens: cut otherwise", *outputs("tokens", "12", "1 2")),
    ("AC", "decimal: 1.0 is 1", *outputs("decimal", "1 2.50", "1.0 2.5")),
    ("AC", "decimal: exponents", *outputs("decimal", "1000", "1e3")),
    ("AC", "decimal: with a point, it is rounded", *outputs("decimal", "0.3", "0.30000000000000004")),
    ("WA", "lines: exact to the last digit", *outputs("lines", "0.3", "0.30000000000000004")),
    ("WA", "decimal: nan is nothing", *outputs("decimal", "nan", "nan")),
    ("WA", "decimal: an underscore is no digit", *outputs("decimal", "10", "1_0")),
    ("AC", "float: within an absolute tolerance", *outputs("float:1e-6", "0.1", "0.1000005")),
    ("AC", "float: within a relative tolerance", *outputs("float:1e-6", "1000000", "1000000.5")),
    ("WA", "float: beyond the tolerance", *outputs("float:1e-6", "0.1", "0.1001")),
    ("WA", "float: nan is nothing", *outputs("float:1e-6", "nan", "nan")),
    ("WA", "float: nan is no number", *outputs("float:1e-6", "1", "nan")),
    ("WA", "float: inf is near nothing", *outputs("float:1e-6", "1", "inf")),
    ("WA", "float: nor is an overflow", *outputs("float:1e-6", "1e300", "1e999")),
    ("AC", "json: spelling is free", *outputs("json", '{"a": [1, 2]}', '{ "a":[1,2.0] }')),
    ("WA", "json: not JSON", *outputs("json", "[1]", "[1")),
    ("WA", "bytes that are no UTF-8", "import sys\nsys.stdout.buffer.write(b'2\\xff')", TWO),
    ("WA", "and not what stands for them",
     "import sys\nsys.stdout.buffer.write(b'\\xff')", stdio(("", "\ufffd"))),
    ("AC", "UTF-8 both ways", "print(input()[::-1])", stdio(("äß∂\n", "∂ßä\n"))),
    ("RE", "an encoding error of the program's own", "print('\\udc80')", TWO),
    # checker "program": a problem with several right answers, any order of the three
    ("AC", "another order than the expected one", "print(3, 1, 2)", ORDER),
    ("WA", "no right one", "print(3, 1, 1)", ORDER),
    ("AC", "each test is checked", "print(*range(1, int(input()) + 1))", ORDERS),
    ("WA", "right on the first test only", "print(3, 1, 2)", ORDERS),
    ("RE", "a failed program is not checked", "print(3, 1, 2)\n1/0", ORDER),
    ("AC", "1.0 and white space are 1", "print(2)", checked("print(' 1.00\\n')")),
    ("WA", "part of the points", "print(2)", checked("print(0.999)")),
    ("WA", "more than 1", "print(2)", checked("print(11)")),
    ("WA", "1 is not all that it says", "print(2)", checked("print(1)\nprint(0)")),
    ("WA", "it says nothing", "print(2)", checked("pass")),
    ("WA", "it crashes", "print(2)", checked("print(1)\n1/0")),
    ("WA", "it exits with another status", "print(2)", checked("print(1)\nraise SystemExit(1)")),
    ("AC", "it exits by itself", "print(2)", checked("import sys\nprint(1)\nsys.exit(0)")),
    ("AC", "it has a main guard", "print(2)",
     checked("def main(): print(1)\nif __name__ == '__main__': main()")),
    ("WA", "it is no Python", "print(2)", checked("int main() {}")),
    ("WA", "it takes too much memory", "print(2)", checked("x = bytearray(10**10)\nprint(1)")),
    ("WA", "it cannot leave its sandbox", "print(2)", checked("open('HOSTFILE').read()\nprint(1)")),
    ("AC", "its files are as they were written",
     "import sys; sys.stdout.buffer.write(b'a\\r\\n\\xff\\0')",
     checked("import sys\na, b, c = (open(f, 'rb').read() for f in sys.argv[1:])\n"
             "ok = a == b'i\\r\\n' and b == 'ü'.encode() and c == b'a\\r\\n\\xff\\0'\nprint(int(ok))",
             ("i\r\n", "ü"))),
    ("WA", "what is written for a checker does not run", "print('import os; os.write(1, b\"1\")')", ORDER),
    ("WA", "nothing of the program is left for its checker",
     "for f in ('sys', 'runpy', 'checker', 'sitecustomize'): open(f'/tmp/{f}.py', 'w').write('print(1)')",
     ORDER),
    ("AC", "the program sees no file of its checker",
     "import os\nprint(3, 1, 9 if os.listdir('/tmp') or os.path.exists('correct_output.txt') else 2)", ORDER),
    # functions
    ("AC", "without a name, the one before the first parenthesis", "def any(x): return x + 1", NAMELESS),
    ("RE", "without a name, no method", "class Solution:\n    def f(self, x): return x + 1", NAMELESS),
    ("RE", "without a name, no parenthesis", "f = 5", NAMELESS),
    ("AC", "a function", "def f(x): return x + 1", F),
    ("WA", "a wrong function", "def f(x): return 2", F),
    ("RE", "a function of another name", "def g(x): return x + 1", F),
    ("RE", "a function with other arguments", "def f(x, y): return x + 1", F),
    ("RE", "an exception", "def f(x): raise KeyError(x)", F),
    ("TLE", "does not return", "def f(x):\n    while True: pass", F),
    ("MLE", "a large object", "def f(x): return len(bytearray(10**9))", F),
    ("AC", "a method of Solution, with the imports a judge makes",
     "class Solution:\n"
     "    def f(self, x: List[int]) -> Optional[int]: return max(x)", function(([[1, 3]], 3))),
    ("AC", "prints do not disturb", "print('[2]')\ndef f(x):\n    print(7)\n    return x + 1", F),
    ("AC", "nor does a program without a main guard",
     "def f(x): return x + 1\nif __name__ == '__main__': input()", F),
    ("AC", "each test has a fresh process",
     "n = 0\ndef f(x):\n    global n\n    n += 1\n    return x + n", F),
    ("AC", "a tuple is a list", *returns("json", [1, [2]], "(1, (2,))")),
    ("AC", "1.0 is 1", *returns("json", 1, "1.0")),
    ("WA", "True is not 1", *returns("json", 1, "True")),
    ("WA", "1 is not True", *returns("json", True, "1")),
    ("WA", "'1' is not 1", *returns("json", 1, "'1'")),
    ("WA", "None is not False", *returns("json", False, "None")),
    ("WA", "a set has no JSON", *returns("json", [1], "{1}")),
    ("AC", "keys are texts in JSON", *returns("json", {"1": 2}, "{1: 2}")),
    ("WA", "nan is nothing", *returns("json", float("nan"), "nan")),
    ("AC", "json: a float is a rounded number", *returns("json", 0.3, "0.1 + 0.2")),
    ("WA", "exact: to the last digit", *returns("exact", 0.3, "0.1 + 0.2")),
    ("AC", "float: with tolerance, inside lists", *returns("float:1e-9", [0.3], "[0.1 + 0.2]")),
    ("WA", "float: True is no number", *returns("float:1e-9", 1, "True")),
    ("AC", "a large integer", *returns("json", 10**400, "10**400")),
    ("WA", "more than could be right is not read", *returns("json", [1], "[[]] * 4 * 10**5")),
    # what the runner of LiveCodeBench imports, before functions, methods and programs alike
    ("AC", "pow is the builtin: a modular inverse", solution("x: int", "pow(x, -1, 10**9 + 7) % 2 + x"), F),
    ("AC", "and a large power", "def f(x): return (pow(10, 18) + 1) % 10 + x", F),
    ("AC", "before a program too", "print(pow(3, -1, 5))", TWO),
    ("AC", "sum, min, abs and round are the builtins",
     "print(sum([1], 2) + min(1, 2) + abs(-1) + round(-2.4))", stdio(("", "3"))),
    ("AC", "open is the builtin", "print(open(0).read().strip())", stdio(("2", "2"))),
    ("AC", "string as a module", solution("x", "string.ascii_lowercase.index('b') + x"), F),
    ("AC", "and its names", solution("x", "ascii_lowercase.index('b') + x"), F),
    ("AC", "re", solution("x", "len(re.findall('a', 'banana')) - 2 + x"), F),
    ("AC", "names of re", "def f(x): return len(findall('a', 'banana')) - 2 + x", F),
    ("AC", "sys.maxsize", solution("x", "min(sys.maxsize, x + 1)"), F),
    ("AC", "stdin without an import", "print(sum(map(int, stdin.readline().split())))", ADD),
    ("AC", "sys.stdin without an import", "print(sum(map(int, sys.stdin.read().split())))", ADD),
    ("AC", "deepcopy", "b = deepcopy([[1]])\nb[0][0] = 9\nprint(b[0][0] - 7)", TWO),
    ("AC", "copy is the module", "print(copy.copy([2])[0])", TWO),
    ("AC", "datetime is the module", "print(datetime.date(2020, 1, 2).day)", TWO),
    ("RE", "and not the class", "print(datetime(2020, 1, 2).day)", TWO),
    ("AC", "operator", solution("x", "operator.xor(x, 0) + 1"), F),
    ("AC", "random, statistics, json, io",
     "random.seed(1)\nprint(len(json.dumps([io.StringIO().read()])) - 4 + statistics.mean([2]))", TWO),
    ("AC", "defaultdict, Counter, deque", "d = defaultdict(int)\nd[1] += 1\nprint(Counter('a')['a'] + "
     "len(deque(d)))", TWO),
    ("AC", "isinstance with a name that typing has too",
     "print(2 if isinstance(Counter(), Counter) else 3)", TWO),
    ("AC", "heappush, bisect_left, gcd, lru_cache, accumulate, reduce",
     "@lru_cache(None)\ndef g(n): return gcd(4, n)\nh = []\nheappush(h, g(2))\n"
     "print(reduce(max, accumulate(h)) + bisect_left([1], 0))", TWO),
    ("AC", "type hints of a free function", "def f(x: Optional[int]) -> List[int]: return x + 1", F),
    ("AC", "cache, inf, comb, permutations", "@cache\ndef f(x): return min(inf, comb(x, 0) * x + "
     "len(list(permutations([1]))))", F),
    ("AC", "names behind globals()", "print(globals()['gcd'](4, 2))", TWO),
    ("AC", "names in eval", "print(eval('g' + 'cd')(4, 2))", TWO),
    ("AC", "names in an f-string", "print(f'{gcd(4, 6)}')", TWO),
    ("AC", "math's e, and its pow under its name",
     "import math\nprint(int(math.pow(2, 1)) if e > 2 else 3)", TWO),
    ("AC", "the last name counts: sub is operator's", "print(sub(5, 3))", TWO),
    ("AC", "the program's own names come first", "def gcd(a, b): return 2\nprint(gcd(3, 3))", TWO),
    ("AC", "its own import too",
     "from collections import Counter\nprint(2 if type(Counter()) is Counter else 3)", TWO),
    ("AC", "its own import after a use", "print(gcd(4, 2))\nfrom math import gcd", TWO),
    ("AC", "its own import in a docstring", "'''\nfrom math import gcd\n'''\nprint(gcd(4, 2))", TWO),
    ("AC", "its own import in a branch not taken", "if 0:\n    import math\nprint(math.gcd(4, 2))", TWO),
    ("AC", "names in functions within functions",
     "def f(x):\n    class A:\n        g = lambda self: [gcd(y, 2) for y in [x + 1]]\n    return A().g()[0]",
     function(([1], 2))),
    ("AC", "a module that is imported under another name", "import math as m\nprint(math.gcd(4, 2))", TWO),
    ("RE", "what no judge imports", "print(os.getpid() and 2)", TWO),
    ("RE", "a name that nobody has", solution("x", "ascii_lowercases"), F),
    ("AC", "a method called as an imported function",
     "class Solution:\n    def search(self, x): return x + 1", {**F, "fn_name": "search"}),
    ("AC", "and beside a free function of its name",
     "def f(x): return 9\nclass Solution:\n    def f(self, x): return x + 1", F),
    ("RE", "an imported function is not the program's", "x = 1", {**F, "fn_name": "factorial"}),
    ("RE", "nor without a name", "gcd(1, 2)", NAMELESS),
    ("AC", "__name__ of a function's program", "assert __name__ == 'program'\ndef f(x): return x + 1", F),
    ("AC", "__file__", "import os\nprint(2 if os.path.basename(__file__) else 3)", TWO),
    # limits as a judge has them
    ("AC", "recursion of 5,000 without a word", DEEP.format(5000), TWO),
    ("AC", "recursion of 45,000", DEEP.format(45_000), TWO),
    ("RE", "recursion without an end", "def g(n): return g(n + 1)\ng(0)", TWO),
    ("AC", "recursion of 50,000 through lru_cache, on the C stack",
     "import sys\nsys.setrecursionlimit(10**6)\n@lru_cache(None)\ndef g(n): return n and 1 + g(n - 1)\n"
     "print(g(50_000) - 49_998)", stdio(("", "2"), memory_limit_mb=512)),
    ("RE", "recursion that fills the C stack", STACKED, FILLED),
    ("AC", "a thread with the usual stack",
     "import threading\nt = threading.Thread(target=print, args=(2,))\nt.start(); t.join()",
     stdio(("", "2"), memory_limit_mb=64)),
    ("AC", "a thread with a stack of 512 MB", "import threading\nthreading.stack_size(2**29)\n"
     "t = threading.Thread(target=print, args=(2,))\nt.start(); t.join()",
     stdio(("", "2"), memory_limit_mb=1024)),
    ("AC", "a thread with a stack of 256 MB, where memory is as large",
     "import sys, threading\nthreading.stack_size(2**28)\nsys.setrecursionlimit(10**6)\n"
     "def g(n): return n and 1 + g(n - 1)\ndef main(): print(g(10**5) - 10**5 + 2)\n"
     "t = threading.Thread(target=main); t.start(); t.join()", TWO),
    ("AC", "a program that raises its limit of stack itself",
     "import resource\nlimits = 2**28, resource.getrlimit(resource.RLIMIT_STACK)[1]\n"
     "resource.setrlimit(resource.RLIMIT_STACK, limits)\nprint(2)", TWO),
    ("AC", "an integer of 5,000 digits is printed", "print(10**5000)", stdio(("", "1" + 5000 * "0"))),
    ("WA", "to its last digit", "print(10**5000 + 1)", stdio(("", "1" + 5000 * "0"))),
    ("AC", "and read", "print(int(input()) % 10)", stdio(("7" * 5000, "7"))),
    ("AC", "and returned", *returns("json", 10**5000, "10**5000")),
    ("WA", "another is not", *returns("json", 10**5000, "10**5000 + 1")),
    ("MLE", "memory, in one piece beside the stack's", "x = bytearray(400 << 20)\nprint(2)", TWO),
    ("MLE", "memory mapped by the program",
     "import mmap\nm = []\ntry:\n    while True: m.append(mmap.mmap(-1, 10**8, mmap.MAP_PRIVATE))\n"
     "except OSError: raise MemoryError", TWO),
    ("RE", "shared memory has an end too",
     "import mmap\nm = []\nwhile len(m) < 99: m.append(mmap.mmap(-1, 10**8))", TWO),
    # packages
    ("AC", "numpy", "import numpy as np\nprint(np.array([1, 1]).sum())", NUMPY),
    ("AC", "numpy's linear algebra", "import numpy as np\na = np.ones((200, 200))\n"
     "print(round(np.linalg.det(np.eye(200)) + (a @ a)[0, 0] - 199))", NUMPY),
    ("AC", "numpy's random numbers and transforms", "import numpy as np\n"
     "x = np.random.default_rng(0).permutation(8)\ny = np.fft.ifft(np.fft.fft(x)).real\n"
     "print(2 if np.allclose(x, y) and len(np.roots([1, 0, -1])) == 2 else 3)", NUMPY),
    ("AC", "numpy in a function",
     "import numpy as np\ndef f(x): return int(np.sum([x, 1]))", {**F, "time_limit_s": 3}),
    ("WA", "a number of numpy has no JSON", "import numpy as np\ndef f(x): return np.int64(x + 1)",
     {**F, "time_limit_s": 3}),
    ("MLE", "numpy's memory counts", "import numpy as np\nx = np.ones(10**8)\nprint(2)", NUMPY),
    ("AC", "sortedcontainers",
     "from sortedcontainers import SortedList\nprint(SortedList([3, 2])[0])", TWO),
    ("RE", "no other package", "import numpy\nimport torch\nprint(2)", NUMPY),
    ("RE", "and none that stands beside them", "import sortedcontainers\nimport pip\nprint(2)", TWO),
    ("RE", "no package can be written to",
     "import os, sortedcontainers as s\nopen(os.path.join(os.path.dirname(s.__file__), 'x'), 'w')", TWO),
    ("AC", "nothing else of their folder is there",
     "import os, sortedcontainers as s\nfolder = os.path.dirname(os.path.dirname(s.__file__))\n"
     "print(2 if os.listdir(folder) == ['sortedcontainers'] else 3)", TWO),
    # expected numbers with a point are rounded ones
    ("AC", "decimal: more digits than expected",
     *outputs("decimal", "0.333333333333", "0.3333333333333333")),
    ("AC", "decimal: %.6f", *outputs("decimal", "0.333333333333", "0.333333")),
    ("AC", "decimal: an exponent", *outputs("decimal", "0.000000012", "1.2e-08")),
    ("AC", "decimal: relative to a large one", *outputs("decimal", "2345.678901234", "2345.6790")),
    ("AC", "decimal: five digits, as LeetCode shows", *outputs("decimal", "1.33333", "1.3333333333333333")),
    ("AC", "decimal: an integer is near too", *outputs("decimal", "3.000000", "3")),
    ("AC", "decimal: each number by itself", *outputs("decimal", "2 0.5 YES", "2 0.50000000001 YES")),
    ("WA", "decimal: an integer is exact", *outputs("decimal", "3", "3.0000000001")),
    ("WA", "decimal: beside a rounded one too", *outputs("decimal", "1000000000 0.5", "1000000001 0.5")),
    ("WA", "decimal: beyond 1e-6", *outputs("decimal", "0.333333333333", "0.33333")),
    ("WA", "decimal: two digits are no six", *outputs("decimal", "0.333333", "0.33")),
    ("WA", "decimal: two digits were asked", *outputs("decimal", "0.33", "0.3333333333")),
    ("WA", "decimal: a large one, off by one", *outputs("decimal", "1000000.5", "1000001.5")),
    ("WA", "decimal: however many digits", *outputs("decimal", "12345678.000000", "12345679.000000")),
    ("WA", "decimal: the last of two digits", *outputs("decimal", "1000000.50", "1000000.51")),
    ("WA", "decimal: the sign", *outputs("decimal", "0.5", "-0.5")),
    ("WA", "decimal: one number less", *outputs("decimal", "0.5 0.5", "0.5")),
    ("WA", "decimal: inf", *outputs("decimal", "0.5", "inf")),
    ("WA", "decimal: a comma is no point", *outputs("decimal", "0.5", "0,5")),
    ("AC", "json: five digits", *returns("json", 1.33333, "4 / 3")),
    ("AC", "json: rounded to five digits", *returns("json", [4 / 3], "[round(4 / 3, 5)]")),
    ("AC", "json: a whole float", *returns("json", 3.0, "2.9999999999")),
    ("WA", "json: an integer is exact", *returns("json", 3, "2.9999999999")),
    ("WA", "json: beyond 1e-5", *returns("json", 1.33333, "1.3334")),
    ("WA", "json: a large one, off by one", *returns("json", 1e6 + 0.5, "1e6 + 1.5")),
    ("WA", "json: inf", *returns("json", 0.5, "inf")),
    ("WA", "exact: a float of another value", *returns("exact", 1.33333, "4 / 3")),
    ("AC", "exact: 1 is 1.0", *returns("exact", 1, "1.0")),
    ("AC", "lines: 1.0 is 1, blanks at both ends", *outputs("lines", "1 2.50\n3", " 1.0 2.5 \n3\n\n")),
    ("AC", "lines: blanks between numbers", *outputs("lines", "1 2", "1  2")),
    ("WA", "lines: blanks between words", *outputs("lines", "a b", "a  b")),
    ("WA", "lines: another line break", *outputs("lines", "1 2", "1\n2")),
    ("WA", "lines: a blank line within", *outputs("lines", "1\n2", "1\n\n2")),
    ("WA", "lines: words and numbers", *outputs("lines", "a 1.0", "a 1")),
    # forgeries
    ("WA", "an object equal to everything",
     "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()", F),
    ("WA", "an int equal to everything",
     "class E(int):\n    def __eq__(self, other): return True\n"
     "    __hash__ = int.__hash__\ndef f(x): return E(0)", F),
    ("WA", "a list equal to everything",
     "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()", F),
    ("RE", "leaves before its function is called", "import os\nos._exit(0)\ndef f(x): return 0", F),
    ("RE", "leaves from its function", "import os\ndef f(x): os._exit(0)", F),
    ("RE", "SystemExit from its function", "import sys\ndef f(x): sys.exit(0)", F),
    ("WA", "writes a result of its own to every file",
     "import os\nfor d in range(3, 20):\n    try: os.write(d, b'true')\n"
     "    except OSError: pass\nos._exit(0)", F),
    ("WA", "replaces what writes JSON", "import json\njson.dumps = lambda *a: 'true'\ndef f(x): return 0", F),
    ("WA", "replaces the comparison", "import builtins\nbuiltins.all = lambda *a: True\n"
     "import operator\noperator.eq = lambda a, b: True\ndef f(x): return 0", F),
    ("WA", "replaces the harness's function",
     "import sys\nframe = sys._getframe(1)\nframe.f_globals['plain'] = lambda v: True\n"
     "def f(x): return 0", F),
]


# -- which block is the program ------------------------------------------------------------------------------

TICKS = "```"
PRINT = "print(2)"


def fenced(code=PRINT, tag="python", fence=TICKS, indent=""):
    return "\n".join(indent + line for line in (f"{fence}{tag}", *code.split("\n"), fence))


LOOP = "for i in (2,):\n    print(i)"
DOCSTRING = f'def f():\n    """\n    {TICKS}python\n    f()\n    {TICKS}\n    """\nprint(2)'

# why, response, the program or None
BLOCKS = [
    ("nothing behind it", fenced(), PRINT),
    ("the last of two", fenced("print(3)") + "\nbetter:\n" + fenced(), PRINT),
    ("no word on its language", fenced(tag=""), PRINT),
    ("what it prints, without a tag", fenced() + "\nIt prints\n" + fenced("5", ""), PRINT),
    ("what it prints, with one", fenced() + fenced("5", "\ntext"), PRINT),
    ("what it prints, in C++'s words", fenced() + "\n" + fenced("int main() {}", "cpp"), PRINT),
    ("a summary without a tag, open at the end", fenced() + f"\n{TICKS}\nO(n)", PRINT),
    ("a block without a tag, then a stray fence", fenced(tag="") + f"\n{TICKS}\nDone.", PRINT),
    ("an empty one behind it", fenced() + "\n" + fenced(""), PRINT),
    ("an example before it, without a tag", fenced("5", "") + "\n" + fenced(), PRINT),
    ("an apostrophe in an example before it", fenced("It's '" + "''", "") + "\n" + fenced(), PRINT),
    ("three blanks, in a list", "1. So:\n\n" + fenced(LOOP, indent="   "), LOOP),
    ("four blanks, in a list", "10. So:\n\n" + fenced(LOOP, indent="    "), LOOP),
    ("a tab, in a list", "- So:\n\n" + fenced(LOOP, indent="\t"), LOOP),
    ("behind a list's number", f"1. {TICKS}python\n   print(2)\n   {TICKS}", PRINT),
    ("behind a list's dash, without a tag", f"- {TICKS}\n  print(2)\n  {TICKS}", PRINT),
    ("a blank line in a list", f"   {TICKS}python\n   a = 2\n\n   print(a)\n   {TICKS}", "a = 2\n\nprint(a)"),
    ("all lines indented alike", f"{TICKS}python\n    for i in (2,):\n        print(i)\n{TICKS}", LOOP),
    ("a tag behind the closing fence", f"<answer>\n{fenced()}</answer>", PRINT),
    ("and before the opening one", f"<answer>{fenced()}</answer>", PRINT),
    ("a token behind the closing fence", fenced() + "<|im_end|>", PRINT),
    ("prose behind the closing fence", fenced() + " That is it.\nIt's O(n).", PRINT),
    ("prose that begins like a tag", fenced() + " Code explanation:\nIt's O(n).", PRINT),
    ("a closing fence glued to the code", f"{TICKS}python\nprint(2){TICKS}", PRINT),
    ("and prose behind that", f"{TICKS}python\nprint(2){TICKS} Done.\nIndeed.", PRINT),
    ("a stray last fence", fenced() + f"\nDone.\n{TICKS}", PRINT),
    ("two closing fences", fenced() + f"\n{TICKS}", PRINT),
    ("on a line of prose", f"Here: {fenced()}", PRINT),
    ("on a line of prose, without a tag", f"Here: {fenced(tag='')}", PRINT),
    ("inline fences in prose", f"Use {TICKS}x{TICKS} twice.\n" + fenced() + f"\nNot {TICKS}y{TICKS}.", PRINT),
    ("tildes", fenced(fence="~~~"), PRINT),
    ("tildes without a tag", fenced(tag="", fence="~~~"), PRINT),
    ("tildes around backticks", fenced(f"s = 2\n#\n{PRINT}", fence="~~~~"), f"s = 2\n#\n{PRINT}"),
    ("not closed", f"{TICKS}python\nprint(2)", PRINT),
    ("not closed, but for the response's end", f"{TICKS}python\nprint(2)\n</answer><|im_end|>", PRINT),
    ("not closed before the next one", f"{TICKS}python\nprint(3)\n{fenced()}", PRINT),
    ("in a block of Markdown", fenced(fenced(), "markdown"), PRINT),
    ("four backticks", fenced(fence=TICKS + "`"), PRINT),
    ("fences in a docstring", fenced(DOCSTRING) + "\nDone.", DOCSTRING),
    ("at its very left", fenced(f'"""\n{TICKS}\n"""\nprint(2)'), f'"""\n{TICKS}\n"""\nprint(2)'),
    ("fences in a string", fenced(f"s = '{TICKS}'\nprint(2)"), f"s = '{TICKS}'\nprint(2)"),
    ("fences in a comment", fenced(f"# {TICKS}\nprint(2)"), f"# {TICKS}\nprint(2)"),
    ("an apostrophe in a comment", fenced("# don't\nprint(2)") + "\nDon't.", "# don't\nprint(2)"),
    ("a byte order mark", "\ufeff" + fenced(), PRINT),
    ("line ends of another system", fenced().replace("\n", "\r\n"), PRINT + "\r"),
    ("no block", "print(2)", None),
    ("an empty block", fenced(""), None),
    ("inline fences only", f"Use {TICKS}print(2){TICKS}.", None),
    *((f"tag {tag}", fenced(tag=tag), PRINT) for tag in (
        "Python", "PYTHON", "py", "py3", "python3", "python3.10", "python3.11", "Python 3", "pypy", "pypy3",
        "python:main.py", "main.py", "ipython", "ipython3", "{.python}", "{python}", "{.python .numberLines}",
        "code", " python", 'python title="main.py"')),
    *((f"tag {tag}", fenced(tag=tag), None) for tag in (
        "cpp", "c++", "c", "java", "javascript", "go", "text", "console", "output", "bash", "json", "pycon",
        "python-repl", "pyx", "jython", "pythonic", "codeblock")),
]
