"""English cues. A name in braces stands for a word list in WORDS."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from plugins.judges.lexicons.shape import Lexicon, table, words_of

WORDS: Mapping[str, str] = {
    "end": r"(?=[\s.,;:!?…]*$)",
    "reply": (
        r"(?:answer|reply|replies|response|explanation|comment|feedback|solution|result|message|"
        r"text|version|attempt|draft|wording|phrasing|tone|format|formatting|style|layout|output|"
        r"summary|translation|rewrite|calculation|maths?|arithmetic|total|sum|number|figure|"
        r"sentence|paragraph|list|note|email|code|conclusion|ending|last one|first one|one)s?"
    ),
    "it": r"(?:it|that|this|these|those|they|them)",
    "be": r"(?:is|are|was|were|'s|’s|'re|’re|looks?|looked|sounds?|sounded|reads?|seems?|seemed|"
    r"feels?|felt|came out|comes across(?: as)?|has been|got|gets)",
    "very": (
        r"(?:(?:so|very|really|quite|pretty|rather|just|simply|absolutely|totally|all|still|much|"
        r"a|an|the|such|actually|completely|also|even|exactly|again|both|way|far|truly|perfectly|"
        r"a (?:little|bit|tad|lot)|bit|kind of|sort of|somewhat|plain|clearly|quite simply|"
        r"indeed|now|already|incredibly|extremely|super|honestly|most)\s+)*"
    ),
    "good": (
        r"(?:perfect(?:ly)?|great|excellent|awesome|amazing|brilliant|wonderful|lovely|fantastic|"
        r"superb|nice|good|cool|sweet|neat|terrific|splendid|marvell?ous|fabulous|beautiful|"
        r"outstanding|impressive|helpful|useful|clear|correct|right|accurate|spot on|"
        r"perfectly fine|ideal|delightful|charming|thoughtful|warm|kind|friendly|crisp|"
        r"incredible|magic|stellar|top|well (?:done|said|put|written|explained)|better|best|"
        r"what i (?:wanted|needed|asked for|was (?:looking for|after|hoping for))|"
        r"how i (?:like|want|wanted) it|readable|natural|human|convincing)"
    ),
    "praise": (
        r"(?:perfect|great|excellent|awesome|amazing|brilliant|wonderful|lovely|fantastic|superb|"
        r"nice|good|cool|sweet|neat|terrific|splendid|marvell?ous|fabulous|beautiful|outstanding|"
        r"impressive|correct|spot on|bingo|bravo|yay|hooray|nailed it|exactly|precisely|ideal|"
        r"well done|well put|well said|nicely done|kudos|wow|brill|magic|stellar|super|"
        r"(?:much|way|far|so much|a lot) (?:better|clearer|nicer)|good (?:stuff|one)|that's it)"
    ),
    "bad": (
        r"(?:wrong|incorrect|inaccurate|false|mistaken|off|bad|awful|terrible|horrible|poor|"
        r"useless|unhelpful|rubbish|garbage|nonsense|gibberish|garbled|broken|incomplete|"
        r"unfinished|truncated|cut (?:off|short)|empty|blank|missing|confusing|unclear|vague|"
        r"unreadable|hard to (?:read|follow|understand)|difficult to (?:read|follow|understand)|"
        r"cold|harsh|rude|blunt|curt|stiff|robotic|mechanical|impersonal|generic|bland|"
        r"machine[- ](?:made|like|written)|artificial|wooden|dry|clinical|sterile|disappointing|"
        r"unacceptable|irrelevant|off[- ]topic|wordy|verbose|long[- ]winded|messy|cluttered|"
        r"ridiculous|inappropriate|strict|stern|distant|unfriendly|unkind|mean|boring|dull|weird|"
        r"strange|odd|awkward|pushy|pompous|aggressive|sarcastic|complicated|convoluted|"
        r"repetitive|flat|lifeless|soulless|forced|fake|sloppy|lazy|silly|stupid|careless|"
        r"condescending|a mess|a mistake|an error|an? textbook|"
        r"a machine|a robot|a template|a form letter|a manual|outdated|misleading|not it)"
    ),
    "ask": (
        r"(?:(?:can|could|would|will) you(?: please| kindly| maybe| perhaps| just| possibly)*|"
        r"(?:can|could|may|might) (?:i|we) (?:please )?(?:have|get|see|ask (?:you )?(?:for|to))|"
        r"would you mind|(?:do you think|any chance) you (?:can|could)|please|pls|kindly|"
        r"you (?:should|could|might|need to|must|have to)|let'?s|let us|"
        r"i(?:'d| would) (?:like|love|prefer|appreciate|want) (?:you to|it if|if)|"
        r"i (?:want|need|would need) you to|try to|how about|what about|just|maybe|perhaps)"
    ),
    "redo": (
        r"(?:redo|re-?do|rewrite|re-?write|rephrase|reword|re-?phrase|revise|fix|correct|redoing|"
        r"shorten|simplify|reformat|restate|rework|reconsider|re-?check|double[- ]check|"
        r"tone|clean|tidy|trim|retry|recalculate|recompute|recount|rewriting|rephrasing|"
        r"correcting|fixing|shortening|simplifying|tighten|polish|soften|improve|warm)"
    ),
    "say": (
        r"(?:write|say|answer|explain|put|give|try|do|tell|phrase|respond|reply|show|format|"
        r"present|describe|have|get|see|make|keep|word|send|run|go|look|check|count|read|leave|"
        r"writing|saying|answering|explaining|putting|giving|trying|doing|telling|phrasing|have)"
    ),
    "more": (
        r"(?:more|less|fewer|shorter|longer|simpler|warmer|kinder|friendlier|softer|plainer|"
        r"clearer|nicer|gentler|briefer|tidier|cleaner|looser|lighter|cheerier|specific|concise|"
        r"brief|concrete|precise|personal|plain|friendly|kind|warm|gentle|polite|clear|human|"
        r"natural|encouraging|careful|casual|formal)"
    ),
}


IDIOMS: Sequence[tuple[int, re.Pattern[str]]] = tuple(
    (value, table(rows, WORDS))
    for value, rows in (
        (
            -1,
            (
                r"thanks(?: a lot)? for nothing",
                r"\bnot (?:quite|really|yet|there|so good|great)(?: yet| there)?{end}",
                r"\b(?:wrong|incorrect|not right) again\b",
                r"\bnot (?:like )?(?:that|this)(?: way)?{end}",
                r"(?:yeah|oh) right",
                r"oh great",
                r"(?:great|wow|nice|wonderful|lovely),? (?:another|yet another|more)\b.*",
                r"\bnot (?:really |exactly |quite |at all |very |so |too |that |particularly |"
                r"entirely |even )*(?:what i|good|great|helpful|useful|right|correct|clear|nice|"
                r"it|there|true|accurate|working|convinced|happy|satisfied|a fan|sure (?:about|"
                r"that'?s|this is|it'?s)|the (?:right|correct)|how i|kind|friendly|the answer)\b",
                r"\bno (?:good|use|help)\b",
                r"\b(?:no|nope)\W+(?:it|that|this|the \w+) (?:is|was|should|still)\b",
                r"could (?:be|have been) (?:better|nicer|kinder|clearer|shorter|warmer|friendlier)",
                r"(?:would|might|'d) (?:be|have been|look|sound|read|feel) (?:much |far |a lot |a "
                r"bit |a little )?(?:better|nicer|kinder|clearer|easier|friendlier|more)",
                r"leaves? (?:a lot|much|something) to be desired",
                r"(?:far|miles|a long way) from\b.*",
                r"\b(?:hardly|barely|nowhere near)\b.*",
            ),
        ),
        (
            1,
            (
                r"\bnot (?:at all |half |too |that |so )?(?:bad|shabby|wrong)\b",
                r"can(?:'t|’t|not|'t really) (?:complain|fault|ask for more|go wrong)",
                r"\bno (?:complaints|mistakes?|errors?|notes)\b",
                r"can(?:'t|not) thank you enough",
                r"nothing (?:to complain about|wrong|to add|missing)\b",
                r"could(?:n't|n’t| not) (?:be|have been|ask for|have (?:said|put|done|asked)) "
                r"(?:\w+ ){0,2}(?:better|happier|clearer|nicer|more)(?: myself)?",
                r"never (?:been )?(?:better|clearer)",
                r"you(?:'re| are|’re|'ve been) (?:absolutely |totally |quite |so |very |really )?"
                r"(?:right|a star|a lifesaver|the best|a legend|amazing|great|awesome|helpful|"
                r"good|brilliant|wonderful|a genius)",
                r"(?:that|this|it) (?:should|will|would) (?:do|work|help|be (?:fine|enough|all|"
                r"perfect|great))(?: nicely| fine| great)?",
                r"i stand corrected",
            ),
        ),
        (
            0,
            (
                r"\bno (?:problem|worries|need|rush|doubt|wonder|matter|thanks|thank you|big deal)"
                r"\b(?: to (?:worry|apologi[sz]e|rush)| at all)?",
                r"thank(?:s| you) in advance",
                r"can(?:'t|not) (?:wait|believe|stop|help)\b",
                r"thank(?:s| you)(?: so much| very much)? for (?:trying|your (?:time|patience|"
                r"effort)|the effort|getting back)",
                r"good (?:morning|evening|afternoon|night|day|luck|question|point|to know|idea)",
                r"nice (?:to meet you|try|day|weekend|evening)",
                r"great (?:question|to meet you)",
                r"(?:don't|do not|don’t) (?:worry|mind|bother|get me wrong|hesitate|sweat it)",
                r"(?:sorry|my mistake|my bad|my fault|my error|oops|whoops)\b",
                r"i (?:was|am|'m) (?:\w+ )?(?:wrong|mistaken|confused about)\b.*",
                r"i (?:made|typed|wrote|gave) (?:\w+ ){0,3}(?:mistake|typo|wrong|error)\b.*",
                r"i (?:wanted|meant) to (?:say|thank|ask|tell you)\b",
                r"(?:then|once|now) again\b",
                r"right (?:now|away|there|then)\b",
                r"(?:me|you|him|her|us|them) too\b",
                r"(?:see|talk to|thanks|thank you) (?:you )?again\b",
                r"(?:what|what's|whats|is anything|something|anything)(?: is)? wrong with (?:my|"
                r"the|this|our)\b.*",
            ),
        ),
    )
)

PRAISE = table(
    (
        r"^(?:(?:oh|ah|aha|ooh|wow|yes|yep|yeah|ok|okay|well|and|hey|haha|now|there|still|but|"
        r"then|so|very|really|pretty|just|simply|absolutely|quite|all|even|also|still)\s+)*{praise}"
        r"(?:$|[ !]+(?:job|work|answer|reply|response|explanation|one|stuff|example|help|thanks|"
        r"thank you|thx|cheers|now|as always|again|exactly|and|wording|comment|this time|that|"
        r"this|it|so|then|indeed|for me|to (?:me|hear|see|read)|feedback|note|words|summary|effort)"
        r"\b)",
        r"^(?:right|correct|true|exactly|precisely|yes)$",
        r"\b(?:{it}|you|your {reply}|the {reply}|everything|all|both|here|reads?|which|now) ?{be} "
        r"{very}{good}\b(?! (?:idea|question|point|of a))",
        r"^{be} {very}{good}\b",
        r"^(?:what|such|just|now) an? (?:\w+ )?{praise}",
        r"\b(?:exactly|just|precisely) (?:what|how|the (?:way|kind|sort|thing)|as|like|right)\b",
        r"\bi (?:really |just |absolutely |do |also |quite |do really )*(?:love|like|enjoy|"
        r"adore|loved|liked|enjoyed|appreciate|appreciated) (?:{it}|how|the (?:way|tone)|your|"
        r"every|what)",
        r"^(?:really |absolutely |so |much )*(?:love|like|loving|appreciate) (?:it|this|that|how|"
        r"the way|your)\b",
        r"\b(?:it|that|this|now|code|fix|everything|which)(?: all)? (?:just )?(?:works?|worked|"
        r"helps?|helped|makes (?:perfect |total |complete |so much |a lot of )?sense|did it|"
        r"did the trick|does it|fits|solved|fixed|answers|hits the spot|nails it|clears)",
        r"^(?:makes (?:perfect |total |complete )?sense|works|worked|solved|fixed)(?: (?:now|"
        r"perfectly|great|fine|for me|like a charm|nicely|well))*$",
        r"\byou (?:really |totally |absolutely )?(?:nailed|got it|rock|did (?:it|great|well)|"
        r"made my day|saved|explained (?:it|that|this) (?:(?:so|very|really) )?well|(?:have )?"
        r"helped)",
        r"\b(?:well|nicely|clearly|beautifully|neatly|kindly|warmly|perfectly) (?:done|put|said|"
        r"written|explained|phrased|worded)\b",
        r"\b(?:happy|pleased|delighted|impressed|satisfied|thrilled) with (?:{it}|the|your)\b",
        r"\b(?:great|good|nice|excellent|amazing|fantastic|lovely|wonderful|brilliant) (?:job|work|"
        r"answer|reply|response|explanation|help|comment)\b",
        r"\b(?:so|much|way|a lot|far) (?:better|clearer|nicer|easier|kinder|friendlier|warmer)\b",
        r"\bhelps a lot\b|\bthat's (?:the one|it|more like it)\b|\bmore like it\b",
        r"\b(?:made|makes) me (?:smile|happy|laugh)\b|\bcouldn.t ask for\b",
        r"\bwill (?:love|like|be (?:so |very |really )?(?:happy|pleased|delighted|proud)) ?"
        r"(?:{it}|to|with)?\b",
    ),
    WORDS,
)
THANKS = table(
    (
        r"^(?:\w+ ){0,2}(?:thanks|thank you|thankyou|thx|tysm|ty|many thanks|cheers|much "
        r"appreciated|appreciated|much obliged|bless you)\b(?! (?:note|card|letter|message|email))",
        r"\b(?:thanks|thank you|thx)(?: so much| a lot| very much| a million| a bunch| a ton)?$",
        r"\b(?:i|we)(?:'m| am| do| really|'re| are)? (?:so |very |really )?(?:appreciate|grateful)",
    ),
    WORDS,
)
COMPLAINT = table(
    (
        r"^(?:(?:no|nope|hm+|um+|uh|sorry|well|ugh|ok|okay|still|but|and|oh|ah|also|it|hey|very|so|"
        r"really|rather|quite|pretty|a bit|a little|kind of|sort of|just|simply|completely|"
        r"totally|plain)\s+)*{bad}(?:$| (?:again|answer|result|number|reply|format|tone|way|for|"
        r"to|sum|total|style|i'm afraid|sorry|and|language|name|direction|units?)\b)",
        r"\b(?:{it}|you|your \w+|the {reply}|the \w+|half of it|part of it|something|some of "
        r"(?:it|that|this)|everything|all of (?:it|that|this))(?: \w+)? ?{be} {very}(?:like )?"
        r"{very}{bad}\b",
        r"^{be} {very}{bad}\b|^(?:what|such) an? {bad}\b",
        r"^why (?:all|so many|so much|the) ",
        r"\b(?:the|a|your|you gave|got|same|another|that) (?:\w+ )?(?:wrong|incorrect|bad|silly) "
        r"(?:answer|number|result|total|sum|name|reply|unit|conclusion|thing)s?\b",
        r"\b(?:wrong|incorrect|mistake|error|typo)s? in (?:your|the|that|this|it)\b",
        r"\byou (?:\w+ )?(?:made|have|'ve made|got) (?:\w+ ){0,2}(?:mistakes?|errors?|wrong|mixed "
        r"up|confused)\b",
        r"(?:^|\b(?:{it}|you|{be}|still|way|much|far|a bit|a little|bit|little|just|your \w+|"
        r"the {reply}|a tad|rather|somewhat|slightly) )too (?!late to)\w+",
        r"\byou(?:'ve| have)? (?:\w+ )?(?:forgot|missed|left "
        r"out|skipped|ignored|omitted|overlooked|"
        r"misread|"
        r"misunderst\w+|miscounted|miscalculated|mixed up|confused|dropped|failed|lost|repeated|"
        r"keep|kept|didn['’]?t|did not|haven['’]?t|have not|never|weren['’]?t|aren['’]?t)\b",
        r"\b(?:{it}|that|this|which|the {reply}|your \w+|reply) (?:\w+ )?(?:doesn['’]?t|does not|"
        r"didn['’]?t|did not|isn['’]?t|is not|wasn['’]?t|was not|won['’]?t|can['’]?t|cannot|"
        r"aren['’]?t|weren['’]?t|don['’]?t|fails?|failed|lacks?|misses|missed|needs|stops|breaks|"
        r"broke|ignores|crashes|repeats)\b(?! (?:bad|half bad|matter))",
        r"\bisn['’]?t (?:what|right|correct|it|how|quite|really|very|that|helpful|good|the)\b",
        r"\bi (?:really |just |honestly |still )?(?:don['’]?t|do not|didn['’]?t|did not|can['’]?t|"
        r"cannot|couldn['’]?t) (?:really |quite |even |particularly )?(?:like|love|understand|get|"
        r"follow|want|need|see|read|believe|think (?:that|it|this|so|you)|agree|ask|care for|"
        r"use|make sense)",
        r"\bi (?:hate|dislike|disagree|doubt)\b|\bi(?:'m|’m| am) (?:lost|confused|disappointed|"
        r"frustrated|not (?:sure|happy|convinced|satisfied))\b",
        r"(?<!what )(?<!how )(?<!as )(?<!like )(?<!than )(?<!thing )(?<!one )(?<!way )\bi (?:"
        r"already |just |specifically |clearly |only |had |have )*(?:asked|said|meant|told|was (?:"
        r"asking|expecting|hoping|looking)|expected|hoped|wanted|requested|was after)\b",
        r"\bi can(?:'t|not) (?:\w+ )?(?:that|this|it)\b",
        r"^nothing (?:came|happened|here|there|arrived|showed|appeared|at all|back|to see|changed)",
        r"\bwould (?:be|feel) (?:very |so |rather )?(?:sad|hurt|upset|offended|confused|bored|"
        r"annoyed|angry|disappointed|discouraged|lost|embarrassed)\b",
        r"(?:(?<!\bi )(?:will not|won't|would not|wouldn't|can't|cannot)) (?:\w+ ){1,3}?"
        r"(?:that|this|it)$",
        r"\bcould be (?:said|written|sent|about|for|from) (?:\w+ )?(?:any|every)\w+",
        r"^(?!nothing |what |who |i )\w+ is (?:wrong|incorrect)(?: here)?$",
        r"\bsupposed to (?:mean|be)\b|\bwhat (?:is|was) (?:that|this|it)$|\bwhat does (?:that|"
        r"this|it)(?: mean)?\b",
        r"^(?:nobody|no one|no human|no person|no child|no teacher|who) (?:\w+ ){1,3}?(?:like )?"
        r"(?:that|this|it)$",
        r"\bi(?:'d| would|’d)? (?:much |really |have )*(?:prefer(?:red)?|rather)\b",
        r"\bi (?:really )?wish\b|\bif only\b",
        r"\bwhy (?:did|are|do|would|have|is|was|so|all|the|such|not|can't|can’t|does|no) ?"
        r"(?:you|it|that|this|your|many|much|long|bold|numbers?|list|reply|answer|such|just|the "
        r"{reply}|n't)\b",
        r"\bmakes? no sense\b|\bdoesn['’]?t make (?:any )?sense\b|\bnot? (?:making )?sense\b",
        r"\bare you (?:sure|serious|kidding|joking|there|ok|okay|broken)\b|\bis that all\b",
        r"\b(?:there (?:is|was|'s)|i (?:see|got|get)|came|came up|sent me|gave me) (?:no|nothing|"
        r"an empty|a blank|only|just|gibberish|garbage|half)\b",
        r"\bwhere (?:is|are|did) (?:the|your|my|it)\b",
        r"^(?:huh|what|pardon|eh|come again|seriously|hmm+|ugh|meh|yuck|nope|no)$",
        r"^(?:no|nope)\b(?! (?:one|more|longer|idea))",
        r"\btry harder\b|\bdo better\b|\bgive up\b|\bforget it\b|\bnever ?mind\b",
        r"\b(?:like|as if|sounds|reads|looks) (?:it |this |that )?(?:was |were |came |it |from |by "
        r")*(?:written|made|printed|produced|generated|a machine|a robot|a computer|a printout|a "
        r"template|copied|from a|by a|an? (?:ai|bot|form|manual|worksheet|textbook|report))",
        r"\bmy teacher (?:will|would|might|is going to) (?:know|notice|see|think|spot|suspect)",
        r"\b(?:need|needs) (?:to be|more|some work|work|a bit|less|another|fixing|correcting)\b",
        r"\b(?:check|look at|count) (?:it|that|your \w+|the {reply}) again\b",
    ),
    WORDS,
)
"""What people say about a bad reply; DIRECTIVE finds out whether it also says what to do."""

DIRECTIVE = table(
    (
        r"\b{ask} (?:\w+ ){0,3}?{redo}\b(?: \w+){0,4}? (?:{it}|your|the|again|up|down)\b(?! "
        r"(?:following|attached|below))",
        r"\b{ask} (?:\w+ ){0,3}?{say} (?:\w+ ){0,5}?(?:it|that|this|them|the {reply}|your {reply}|"
        r"an?(?:other)? {reply}|me|the same(?: \w+)?)\b.*\b(?:again|without|instead|rather|in "
        r"(?:plain|simple|your own|normal|full|one|a|ordinary|everyday|fewer)|like|as|once more|"
        r"{more}|the way|properly|differently|"
        r"another way|a different way|minus|with(?: a)? {more}|over|"
        r"not)\b",
        r"\b{ask} (?:\w+ ){0,2}?{say} (?:\w+ ){0,2}?(?:without|again|once more|in \w+|plainly|"
        r"differently|properly|like a (?:person|human))\b",
        r"\b(?:can|could|would) (?:you|it|that|this|the {reply}|your \w+) (?:please |maybe |just "
        r")*(?:be|sound|feel|look|read|have been)\b",
        r"\bi (?:don't|do not|didn't) (?:want|need) (?:\w+ ?)+",
        r"(?:^|\b(?:please|and|but|so|just|ok|okay|hm+|no|well|or|also|then|next time|this time|"
        r"kindly|could you|can you) )(?:don['’]?t|do not|stop|avoid|quit|never|skip|drop|lose|"
        r"omit|cut|remove|"
        r"leave (?:out|off)|get rid of|ditch|no need for|enough (?:with|of))\b(?=.*\w)",
        r"^(?:(?:so|and|but|now|ok|okay|well|also|then|please|pls|just|maybe|no)\s+)*{redo} (?:"
        r"{it}|your|the {reply}|up|down)\b(?! following)",
        r"^(?:(?:so|and|but|now|ok|okay|well|also|then|please|pls|just|maybe)\s+)*(?:be|sound|stay|"
        r"stick to|keep (?:it|to|things)|make (?:it|that|this|them)|answer (?:the|my|in|with)|try "
        r"(?:again|it|that|once)|do (?:it|that) (?:again|over|properly)|say (?:it|that)|start "
        r"over|start again|look again|check (?:it|that|your|again)|count again|think again|"
        r"(?:write|put|explain|phrase|give|tell|show|say) (?:it|that|this|me that|me the|the "
        r"{reply}|your)|give me (?:just|only|the)|one more time|once more|once again|again|go "
        r"back|change (?:it|that|the|this))\b",
        r"^(?:(?:a|just|only|slightly|in|and|but|so|something|this time|next time|maybe|with|it|"
        r"please|be|to be|bit|little|much|far|tad|way)\s+)*(?:without|{more}|fewer|no|plain|"
        r"only|just|full|in plain|complete) (?:\w+ ){0,5}?(?:please|pls|next time|this time|"
        r"instead|thanks|thank you)$",
        r"^(?:more|less|fewer|shorter|longer|simpler|warmer|kinder|friendlier|softer|plainer|"
        r"clearer|again|once more|one more time|plain text|plain sentences|just the \w+|only the "
        r"\w+)$",
        r"\b(?:next time|from now on|going forward|in future|in the future|for the future|this "
        r"time|for next time|another time)\b(?! (?:period|step|i))",
        r"\b(?:again|once more|one more time|another (?:try|go|attempt|shot|stab))(?: please)?$",
        r"\b(?:have|give it|take|try) another (?:try|go|attempt|shot|stab|look|crack)\b",
        r"\b(?:instead of|rather than)\b|\binstead$",
        r"\b{it} (?:really |actually |just |all )*(?:should|ought to|must|has to|have to|was "
        r"supposed to|is supposed to|needs to)\b(?! (?:do|work|help|be (?:fine|enough|all)))",
        r"\b(?:the|your|my|a) (?:\w+ )?{reply} (?:really |actually )*(?:should|ought to|must|was "
        r"supposed to|is supposed to|has to|needs to|is actually|is really)\b",
        r"\b(?:{it}|the (?:\w+ )?{reply}) (?:is|was|'s) (?:actually|really|in fact) (?:\d|an? )",
        r"(?<!how )(?<!what )(?<!way )\bi(?:'d| would|) (?:just |only |really )*(?:like|love|want|"
        r"need|prefer) (?:it|that|this|them|the {reply}|your {reply}|something|an? (?:\w+ ){0,2}"
        r"{reply}|{more}) (?:\w+ "
        r")*(?:in|without|as|like|to|that|which|written|with|again|{more}|the way|"
        r"and|instead|rather|not)\b",
        r"^(?:better|rather) (?:to )?{say}\b",
        r"(?<!what )\bi (?:get|got|count|counted|make (?:it|that)|come to|came to|calculated|"
        r"computed|arrive at) \d",
        r"\bi (?:think|believe|say|guess|suspect|know)(?: that)? (?:it(?:'s| is| should| must)|the "
        r"{reply} (?:is|should)|(?!it |that |this |you |your )\S+ (?:is|was|would be) (?:right|"
        r"correct|the {reply}))\b(?! (?:right|good|great|perfect|fine|correct))",
        r"\b(?:my|the|our) \w+ (?:says?|said|thinks|claims|shows|told me|has|gives) (?:that |me )?"
        r"(?:it(?:'s| is| should| must)|the {reply} (?:is|should)|\d)",
        r"^not so \w+(?: please)?$",
        r"\bshould(?:'ve| have| be| say| read|n['’]?t)\b",
        r"\b{ask} (?:\w+ )?(?:double[- ]check|re-?check|answer (?:the|my|what i)|try (?:again|"
        r"once|another)|take another|have another|start (?:over|again)|finish|complete "
        r"(?:it|that|the {reply})|continue|say something|add|include|mention|leave out|use|"
        r"stick|point out|be)\b",
        r"\bi (?:just |only |really )*(?:want|need|prefer|like) (?:\w+ ){0,2}?(?:plain|normal|"
        r"simple|full|natural|ordinary|proper|short|shorter|something (?:specific|concrete|"
        r"friendlier|warmer|kinder|shorter|simpler))\b",
    ),
    WORDS,
)
"""What people say about how the reply should be; such sentences make a hint."""

NEW_TASK = table(
    (
        r"^(?:(?:ok|okay|so|and|alright|all right|right|great|good|well|but|anyway|then|here)\s+)*"
        r"(?:next (?:one|question|task|topic|problem|up|is)|next$|new (?:one|question|task|topic|"
        r"problem)|another (?:one|question|task|problem|topic)|moving on|on to|onto|different "
        r"(?:topic|question|subject)|by the way|btw|unrelated|changing the|change of (?:topic|"
        r"subject)|one more (?:question|thing|task|problem)|let(?:'s|s| us) (?:move|switch|"
        r"talk|go on|do the next|look at)|question \d|my (?:next|other|second)|(?:for )?the next|"
        r"for my next|switching|"
        r"on (?:another|a different)|here(?:'s| is| comes) (?:another|the next|my next|a new))\b",
    ),
    WORDS,
)
"""Opens the next task whatever else the sentence says."""

SOFT_TRANSITION = table(
    (
        r"^(?:(?:ok|okay|so|and|well|but|then)\s+)*(?:now|also|anyway|anyways|meanwhile|then|"
        r"what(?:'?s)?|"
        r"how(?:'?s)?|who(?:'?s)?|when|which|where(?:'?s)?|a (?:new|different|second|quick|"
        r"follow-?up)|i (?:also|now|have a"
        r"|have another|need a|need an|'ve got)|(?:could|can) you (?:also|now|help)|something else|"
        r"speaking of)\b",
    ),
    WORDS,
)
"""Opens the next task unless the sentence speaks about the reply."""

REFERENCE = table(
    (
        r"\b(?:it|that|again|instead|this time|next time|once more|rather|you|your|redo|the "
        r"{reply})\b",
    ),
    WORDS,
)
"""Words by which a sentence points at the reply."""

POINTED = table(
    (
        r"^(?:no|nope|wrong|sorry|actually)\W+.*\b(?:is|are|was|were|makes?)\b (?!wrong|not|bad)",
        r"\b(?:wrong|incorrect|mistake|not (?:right|correct)|error|right|correct)\b.*\d",
        r"\btoo \w+",
        r"\byou (?:\w+ )?(?:forgot|missed|left out|skipped|ignored|omitted|didn['’]?t|did not|"
        r"haven['’]?t|misread|mixed up) (?!get|understand)\w+ \w+",
        r"(?<!what )(?<!how )\bi (?:\w+ )?(?:asked (?:for|you)|wanted|meant|said|requested|"
        r"was (?:hoping|looking) for|"
        r"expected|was after)\b",
        r"\b(?:needs|lacks|prefer|(?:'d|would) rather|wish)\b",
        r"would (?:be|have been|look|sound|read|feel) (?:\w+ ){0,2}?(?:better|nicer|kinder|clearer|"
        r"easier|friendlier|more)",
    ),
    WORDS,
)
"""Complaints that say what was wrong: they make a hint if nothing says what to do."""

IMPERATIVE = table(
    (
        r""
        r"^(?:(?:and|so|but|then|just|only|please|also|pls|maybe|ok)\s+)*(?:use|write|say|give|"
        r"tell|"
        r"keep|mention|include|add|put|talk|start|end|name|show|explain|answer|point|be|make|pick|"
        r""
        r"describe|speak|sound|leave|try|stick|tell|no|without|only|just|plain|praise|address|"
        r"state)"
        r"\b",
        r"^(?:{it}|the {reply})(?:'s| is| was| are) (?:actually |really |in fact )*(?:\d|\w+$)",
    ),
    WORDS,
)
"""An order, or the right value, that belongs to the complaint before it."""

ORDER = table(
    (
        r"^(?:(?:and|so|but|then|now|ok|well|or|hm+|no|instead|rather|next time|this time)\W+)*"
        r"(?:{ask}\s|(?:please |just |better )*(?:write|say|give|tell|mention|include|talk|"
        r""
        r"name|show|explain|answer|point|describe|speak|address|state|praise|encourage|compare|"
        r"check|"
        r"count|consider|remember)\b)(?!.*\bhow (?:many|much)\b)",
    ),
    WORDS,
)
"""An order; it is about the reply when it names what the turn named."""

CONTRAST = re.compile(
    r"[,;:—–-]*\s+(?:but|however|although|though|except|only that|yet)\s*,?\s+"
    r"|^(?:but|however|still|yet|that said|having said that)\s*,?\s+",
    re.IGNORECASE,
)

BARE = words_of(
    """
    please could can would you try again it that this do done fix correct redo check look answer my
    your question once more one time write have another go attempt over start the properly now then
    so just and rewrite repeat kindly reply retry mind doing fixing correcting ok no i want like
    to be up me a
    """
)
"""An order with only these words asks for another try and does not say what to change."""

COMMON = words_of(
    """
    a an the and or but so of to in on at by for from with without as is are was were be been being
    am do does did done doing have has had having will would can could shall should may might must i
    me my mine we us our you your yours he him his she her it its they them their this that these
    those there here what which who whom how when where why not no nor only just very too also then
    than if because about into over again more most less least some any all both each few other
    another such own same please kindly thanks thank something anything nothing everything
    someone nobody leave out drop skip avoid stop don't doesn't didn't isn't can't won't rewrite
    hm hmm um oh ok okay well redo
    try talk speak mention name include add instead without next time again now
    say said write wrote written tell told give gave put answer answers reply response explain show
    make made use used using get keep try let like want need ask asked know think look sound read
    word words worded sentence sentences paragraph prose plain simple normal natural ordinary text
    bold asterisk asterisks star stars markdown heading headings header headers bullet bullets
    point points number numbers numbered list lists step steps table tables emoji emojis symbol
    symbols formatting format style tone label labels final result solution line lines short
    shorter long longer brief briefly concise specific concrete exactly exact precise clear clearly
    kind kinder kindly nice nicer warm warmer friendly friendlier gentle polite encouraging human
    person people personal voice casual formal way different differently better good well right
    wrong correct properly proper directly simply really actually bit little lot everyday
    language english detail details example examples comment comments feedback message note
    """
)
"""Words that do not tell a message's subject, or that are about how a reply is written."""

SERVED = table(
    (
        r"\b(?:finally|at last)[,!.]* (?:it |that |someone |something |a |an |some )|"
        r"\b(?:like magic|smooth(?:ly)?|flawless(?:ly)?|life ?saver|gold|goat|bingo|tysm|ily|"
        r"10/10|a\+|chef's kiss|so (?:good|helpful|clear|simple|easy|cool|true)|super (?:helpful|"
        r"useful|clear|quick))\b(?! (?:plated|fish))",
        r"\b(?:reviewer|prof|professor|landlord|neighbou?r|doctor|accountant|tenant|partner|"
        r"mother|father|sister|brother|son|daughter|grandma|colleague)s? (?:\w+ )?(?:loved|loves|"
        r"approved|accepted|agreed|said yes|was (?:thrilled|happy|impressed)|laughed|cried|"
        r"understood|replied|is happy)\b",
        r"\b(?:got the (?:job|part|flat|apartment|visa|loan|interview|grant)|passed (?:the|my|it|"
        r"with)|aced (?:it|the|my)|said yes|we won|i won|slept (?:like|through)|delicious|tasty|"
        r"yummy|is a beauty|turned out (?:great|perfect|amazing|lovely|well)|"
        r"everyone wanted (?:more|seconds))\b|\b(?:rash|pain|error|noise|smell|lag|bug|leak|"
        r"warning|problem|flicker|flies|stain|itch|cough|mould|mold|squeak|drip|crash\w*) (?:is|"
        r"are|has|have) (?:\w+ )?(?:gone|disappeared|stopped)\b",
        r"\byou (?:absolute |total |are a |are the )?(?:legend|star|hero|genius|rockstar|"
        r"lifesaver|wizard|angel|champ|beauty|best)\b|\b(?:keeping|stealing|saving|framing|"
        r"adopting|approving) (?:it|this|that)\b|\bsigned (?:it |this |that )?off\b|\b(?:zero|no|"
        r"0) (?:failures|issues|problems|bugs)\b|\bsorted\b(?! by)",
        r"^(?:(?:yes|yep|yeah|ok|that|it|this|all|both|everything) )*worked\b(?! until| before)|"
        r"\b(?:u|you) (?:just |really |totally )?saved\b|\bbest \w+ (?:\w+ )?(?:i|we)(?:'ve|"
        r" have)?\b|\b(?:i|we)(?:'ve| have) ever (?:had|seen|made|read|got)\b|\bmissing (?:piece|"
        r"link|bit)\b|\blike crazy\b",
        r"\b(?:you(?:'re| are| were)|you both) (?:absolutely |quite )?right\b|"
        r"\bi stand corrected\b",
        r"\b(?:merging|merged|shipping it|using (?:it|this|that)|going with (?:it|this|that)|"
        r"sending (?:it|this) (?:off|out|now|as)|sent it|printed it|pasted it|ship it|lgtm|sold|"
        r"consider it done)\b",
        r"\bi(?:'ll| will) (?:take|use|go with|keep|send|steal|frame) (?:it|this|that|these|them|"
        r"the \w+)\b",
        r"\b(?:that|this|it)(?:'ll| will) do\b(?! (?:it )?again)|\bi owe you\b|\bgood enough\b",
        r"\b(?:that|it) was (?:it|the (?:problem|culprit|issue|cause)|exactly (?:it|that))\b|"
        r"\b(?:turns|turned) out (?:it|that) was\b",
        r"\b(?:works?|working|runs?|running|boots?|passes|builds?|compiles|loads?|opens?|prints?|"
        r"plays|back|fixed|solved|resolved|gone|green|live|online|all good|all set|"
        r"all green) (?:now|again|fine|perfectly|flawlessly|smoothly|like (?:a charm|new)|"
        r"at last|finally|first (?:try|time|go))\b",
        r"\b(?:on|at) (?:the )?first (?:try|run|go|attempt)\b|\bfirst try$|\bno more (?:errors?|"
        r"crashes|leaks?|warnings?|noise|complaints)\b|\b(?:zero|no) (?:errors?|warnings?|"
        r"complaints)(?: now)?$",
        r"\b(?:ticket|case|issue|book) (?:is )?closed\b|\bclos(?:e|ing) (?:the|this) (?:ticket|"
        r"issue|case)\b",
        r"\b(?:boss|client|customer|team|kids?|wife|husband|mom|mum|dad|teacher|editor|they|he|"
        r"she|everyone|everybody) (?:\w+ )?(?:loved|loves|approved|signed off|got it|said yes|"
        r"was (?:thrilled|happy|impressed|delighted)|laughed|is happy|are happy|accepted it)\b",
        r"\b(?:chef's kiss|works on my machine too|day made|mind blown|hat tip|hats off|"
        r"take a bow|now i (?:get|see|understand) it|it (?:finally )?clicked|learned something|"
        r"today i learned|til)\b",
        r"\bhad me (?:laughing|smiling|crying)\b|\bi(?:'m| am) (?:impressed|amazed|in awe|sold|"
        r"relieved|convinced)\b|\bwhat a relief\b|\bphew\b",
    )
)
"""More praise: the reply was used, or a problem is gone."""

FAILED = table(
    (
        r"\bdid you (?:even |actually )?(?:read|look|listen|check|try|test|run|see)\b|"
        r"\b(?:cancel|scrap|drop|ditch|bin|discard) (?:it|that|this|them)\b",
        r"\b(?:one|another) more (?:go|try|time|shot|attempt|round)\b|\bin (?:one|a single|"
        r"two) (?:sentence|word|line)s?$",
        r"\b(?:same|still the|still an?) (?:error|problem|thing|result|issue|bug|crash|message)\b",
        r"\b(?:revert|undo|roll (?:it |that )?back|put (?:it|that|everything) back|start (?:over|"
        r"again)|from scratch|recalculate|re-?run|do it (?:over|again|properly)|do over|"
        r"delete (?:that|it|them))\b",
        r"\bi(?:'ll| will) (?:just )?(?:do|look|check|write|handle|fix|book|call|ask|google|"
        r"find) (?:it|them|that|someone|somewhere|into it)?(?: \w+)? ?(?:myself|by hand|manually|"
        r"elsewhere|instead)\b|\blet's (?:drop|leave) (?:it|this|that)\b|"
        r"\bthis is (?:going nowhere|pointless|hopeless)\b",
        r"\b(?:it|that|he|she|which|everything)(?:'s| is| are| has) (?:now )?(?:gone|disappeared|"
        r"vanished|missing|deleted|broken|down)\b",
        r"\b(?:everybody|everyone|every \w+) (?:has|does|says|knows|uses) (?:that|this|it|one)?",
        r"\bthe one thing i (?:asked|said|wanted|needed)\b|"
        r"\bwhich is (?:exactly )?what i (?:asked|said|wanted) (?:you )?(?:not|to avoid)\b|"
        r"\bi(?:'m| am) (?:still )?stuck\b",
        r"^you (?:changed|broke|deleted|removed|dropped|renamed|overwrote|put|swapped|translated|"
        r"sent|invented|made up|booked|hard-?coded)\b",
        r"\bstill (?:prints?|shows?|says?|fails?|crashes|breaks|throws|gives?|gets?|wrong|broken|"
        r"not|the|no|has|happens|happening|there|failing|returns?)\b",
    )
)
"""More complaints: something still fails, was undone, or is given up."""

ENGLISH = Lexicon(
    signs=words_of(
        """
        the of to and is it that you i for not but with this my thanks are have what how can could
        would please did your at on from be or as if they there just it's i'm don't that's isn't
        """
    ),
    idioms=IDIOMS,
    praise=re.compile(f"{PRAISE.pattern}|{SERVED.pattern}"),
    thanks=THANKS,
    complaint=re.compile(f"{COMPLAINT.pattern}|{FAILED.pattern}"),
    directive=DIRECTIVE,
    mockery=table(
        (
            r"\b(?:great|nice|cool|perfect|lovely|awesome|good|wonderful|"
            r"brilliant)[,.!]* (?:so )?now (?:nobody|no one|nothing|i have to|we have to|i can't|"
            r"it (?:doesn't|won't|can't|isn't))\b|\b(?:yes|yeah|sure)[, ]+because\b|"
            r"\bcongrat\w*[,!.]* (?:you|now|on)\b|\bit only took\b",
            r"\bthanks for (?:that|the|this) (?:\w+ )?(?:insight|wisdom|essay|sermon|lesson)\b",
            r"\b(?:sherlock|einstein|captain obvious|no shit|nobel|pulitzer|groundbreaking|"
            r"rocket scien\w+|slow clap|crystal ball|color me|colour me|genius move)\b",
            r"\b(?:gee|wow|oh|well|great|perfect|lovely|brilliant|fantastic|wonderful|nice|"
            r"awesome|amazing|excellent|super|good|cool|"
            r"thanks)[,.!]* (?:so )?(?:now )?(?:i(?:'ll| will| can| guess| get to)|we(?:'ll|"
            r" will| can)|let me|my \w+ (?:will|can)|the \w+ will|because)\b.*\b(?:then|just|now|"
            r"guess|all night|love|forever|instead|never|only)\b",
            r"\b(?:i(?:'d| would) never have|never would have|who (?:knew|would have|could have)|"
            r"i had no idea (?:that )?(?:\w+ ){1,4}(?:was|were|is|are))\b",
            r"\b(?:what would (?:i|we) do without|how (?:very )?(?:helpful|insightful|original|"
            r"thoughtful|considerate) of you|thanks for (?:nothing|stating|clearing that|"
            r"the (?:tip|insight|revelation|history lesson|lecture|novel)))\b",
            r"\b(?:yeah|sure|right|oh|totally|clearly),? (?:because|cause|cuz|as if|like (?:that|"
            r"i|we))\b|\bas if\b(?! (?:it|by|you|they|he|she|there|nothing))|\bjust what (?:i|we|"
            r"the world) (?:always )?(?:needed|wanted)[:,.] (?:another|more)\b",
            r"\b(?:bold (?:choice|move|strategy)|love that for (?:me|us)|love how (?:you|"
            r"it) (?:\w+ )?(?:ignored|completely|managed|forgot)|(?:great|good|nice|"
            r"amazing) job (?:ignoring|breaking|deleting|missing)|how (?:reassuring|convenient|"
            r"nice|kind|comforting) (?:of|to)|so much for|in case (?:i|anyone|we) (?:forgot|"
            r"wondered|missed)|good thing (?:i|we|nobody|no one)|said no one|dream come true|"
            r"that's one way to|who needs|who doesn't (?:love|want|need)|my favou?rite part|"
            r"you really outdid|i guess (?:i|we|my|the) (?:\w+ )?(?:can|will|should|don't|just|"
            r"must|have))\b",
            r"\b(?:my|a) (?:grandma|grandmother|toaster|cat|dog|toddler|magic 8|coin flip|"
            r"goldfish) (?:could|would|can|knows|writes|does)\b|\bcan't wait to (?:explain|meet|"
            r"tell|hear|see (?:the|my) (?:boss|look|client))\b|\bwhat a (?:surprise|shock|"
            r"revelation|shocker|concept)\b|\bround of applause\b|\bgive (?:it|that|yourself|the|"
            r"this) (?:\w+ )?(?:a medal|an award|a cookie)\b|\bglad (?:that's|we) (?:cleared|"
            r"cleared that|settled)\b|\btruly (?:inspired|revolutionary|groundbreaking)\b|"
            r"\btell me more about (?:things|stuff)\b",
        )
    ),
    earnest=table((r"\bseriously\b", r"\b(?:just )?(?:kidding|joking)\b", r"\ball jokes aside\b")),
    undecided=table(
        (
            r"\b(?:i|we)(?:'ll| will| need to| have to| want to| should| must|"
            r" still need to)(?: \w+)? (?:ask|discuss|talk|sleep on|decide|compare|consult|"
            r"verify|double[- ]check with|wait)\b",
            r"\b(?:torn|undecided|either way|mostly|for the most part|some of (?:it|them|these|"
            r"those)|a few of (?:it|them|these)|almost all|most of (?:it|them)|don't know (?:yet|"
            r"if|whether|about the)|no idea (?:yet|if|whether|about the)|jury|remains to be seen|"
            r"depends|hit-and-miss|some (?:are|were|work|did))\b",
            r"^\b(?:one|two|three|four|first|second|third|last|other|others|rest|some|most|half|"
            r"part|both|left|right|top|bottom|page|the \w+|my \w+|(?:mon|tues|wednes|thurs|fri|"
            r"satur|sun)day)\b (?:\w+ ){0,3}?(?:works?|working|loads?|loading|runs?|passes|fixed|"
            r"done|sent|ok|okay|sends?|prints?|opens?|faster|better|quieter|shorter|moved|"
            r"updated|correct|right|fine|perfect|great|good|spot on)\b[^?]{0,60}[,;.] ?(?:but |"
            r"and |though )?(?:\b(?:one|two|three|four|first|second|third|last|other|others|rest|"
            r"some|most|half|part|both|left|right|top|bottom|page|the \w+|my \w+|(?:mon|tues|"
            r"wednes|thurs|fri|satur|sun)day)\b|(?:one|two|three|four|first|second|third|last|"
            r"other|others|rest|some|most|half|part|both|left|right|top|bottom|page|the \w+|"
            r"my \w+|(?:mon|tues|wednes|thurs|fri|satur|sun)day)\b) [^?]{0,60}\b(?:doesn't|don't|"
            r"isn't|aren't|won't|not|still|fails?|failed|broken|error|missing|same|nothing|never|"
            r"no idea|unchanged|slow|empty|blank|off|wrong|cropped|haven't|hasn't)\b",
            r"\b[1-9]\d* (?:out )?of (?:the )?(?:\d+|them|these|five|ten|three|four|six)\b",
            r"\bthe other (?:one|two|three|part|half)\b|\bnot (?:so|too|quite|entirely|really|"
            r"completely) sure (?:about|on)\b|\bthe rest (?:still|is|isn|does|doesn|hangs|fails)",
            r"\b(?:first|one|some|outbound|top|left|upper|most)\b.{0,80}\b(?:fine|good|works?|ok|"
            r"okay|great|perfect|done|right)\b.{0,80}\b(?:second|other|others|rest|return|bottom|"
            r"right|lower|last|third)\b.{0,80}\b(?:still|not|\w+n't|no|error|fails?|broken|wrong|"
            r"missing|later)\b",
            r"\bi(?:'ll| will)(?: just| probably| have to| need to)? (?:read|check|test|try|look|"
            r"think|get back|let you know|see|report|take a (?:closer )?look|"
            r"have a (?:proper )?look|review|ask|sleep|run it|give it a (?:try|go|spin)|"
            r"show (?:it|this)|go (?:over|through))\b(?!.* myself)",
            r"\b(?:get back to you|let you know|report back|sleep on it|wait and see|"
            r"time will tell|we'll see|will see|let me (?:check|think|see|try|test|read|run|look|"
            r"sleep|show|ask))\b",
            r"\b(?:not|haven't|hasn't|didn't) (?:\w+ )?(?:sure yet|sure (?:what|if|whether|which|"
            r"how)|tried|tested|checked|looked|read|had time|decided|had a chance|"
            r"made up my mind|gotten to|got round)\b(?! (?:this|that) again)|\btoo early to\b|"
            r"\bhard to (?:say|tell)\b|\bcan't (?:say|tell|judge)(?: yet)?\b|\bon the fence\b|"
            r"\bin two minds\b|\bjury'?s (?:still )?out\b",
            r"\b(?:50/50|fifty[- ]fifty|so-?so|mixed (?:bag|feelings)|hit (?:and|or) miss|"
            r"half (?:of it|of them|works|right|done|there|fixed|way)|(?:first|second|"
            r"other) half|partly|partially|somewhat|sort of works|kind of works|kinda)\b",
            r"\b(?:maybe|perhaps|could be|might be|may be|possibly) (?:it's |it is |just )?(?:me|"
            r"my|mine|our|unrelated|something else|the (?:cache|network|wifi|monitor))\b",
            r"\b(?:works?|working|fixed|fine|better|faster|done|gone|solved|loads|"
            r"runs)\b.{0,80}\b(?:but|though|except|however|only)\b.{0,80}\b(?:still|not|\w+n't|"
            r"never|missing|same|slow|fails?|broken|other|rest)\b",
            r"\bsome(?:thing|what)?(?:'s| is)? better\b|\b(?:the )?rest (?:later|next week|"
            r"can wait)\b",
        )
    ),
    doubt=table(
        (
            r"\b(?:though|tho)$|^(?:uh+|um+|er+m?|erm)\b|\bshould (?:be|have|read|say|leave|"
            r"start|go|come|use)\b",
            r"\b(?:isn't|aren't|wasn't|weren't|wouldn't|doesn't|shouldn't|hasn't|didn't|"
            r"don't) (?:that|it|this|the|they|there|you|we|he|she|most|all|these|those)\b",
            r"\b(?:i think|i thought|i believe|pretty sure|fairly sure|quite sure|i(?:'m|"
            r" am) sure|as far as i|afaik|iirc|if i'm not mistaken|unless i|correct me|"
            r"to be picky|nitpick|picky|one (?:small|tiny|little) thing|small thing|slipped|"
            r"swapped|the other way|off by|should(?:n't)? be|supposed to|mind having|"
            r"mind (?:re)?checking|another look|if you don't mind|would be (?:great|nice|good|"
            r"better)|otherwise (?:fine|good|ok|great|perfect)|you're describing|you mean|"
            r"that's (?:the|a|an|for|from|last|this) \w+)\b",
            r",? (?:no|right|or not|or)\?+$|\?\?+|^(?:\w+ ){1,2}only\b|\bonly,? please\b",
        )
    ),
    negation=table((r"\b(?:not|never|nothing|none|no|\w+n't|cannot|neither)\b",)),
    new_task=NEW_TASK,
    soft_transition=SOFT_TRANSITION,
    reference=REFERENCE,
    no_reference=re.compile(
        r"\b(?:can|could|would|will|are|do) you\b|\b(?:an?|the|any|some) (?:\w+ )?\w+ that\b"
    ),
    pointed=POINTED,
    imperative=IMPERATIVE,
    order=ORDER,
    contrast=CONTRAST,
    conjunction=re.compile(r"\s+(?:and|because|since|so)\s+"),
    answered=re.compile(
        r"^(?:no|nope|yes|yep|yeah|sure|correct|right|exactly)\b(?!\W+thank)\W*", re.IGNORECASE
    ),
    bare=BARE,
    common=COMMON,
)
